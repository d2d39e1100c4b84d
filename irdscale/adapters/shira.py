"""Adapters for PEFT's SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175), which stock PEFT loads onto the base model.

SHiRA adds one sparse matrix to each linear layer's weight: r (m + n) int32 indices and values in an m x n layer, with
one r for all layers. The scale is 1 and the sum is rounded to the weight's type, so the effective weights are the
sparse model's. Layers with fewer entries are padded with zeros outside the mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.errors import InputError
from irdscale.sparse.model import sparse_state, trained_numbers
from irdscale.utils.files import write_folder, write_json
from irdscale.utils.quantized import any_quantized

PREFIX = "base_model.model."


def export_shira(model: nn.Module, folder: Path | str, also: Sequence[str] = ()) -> dict[str, Any]:
    """Write a sparse model's trained parameters as a PEFT adapter: adapter_config.json and adapter_model.safetensors.

    `PeftModel.from_pretrained(base, folder)` then gives the sparse model's logits, bit for bit, if `base` holds the
    same weights (PEFT does not check that). On a bfloat16 or float16 base, its options `autocast_adapter_dtype=False`
    and `low_cpu_mem_usage=True` round the values to the base's type first.

    Modules with densely trained parameters go to `modules_to_save`, and so do layers that r (m + n) indices do not fit,
    because they are dense or small. r minimises the file's size. The model stays as it is.

    Args:
        also: names of further parameters to store in full, such as a new head that the base checkpoint does not hold.

    Returns:
        {"r", "layers", "stored", "whole"}: r, layers with a sparse matrix, indices stored in them, modules stored in
        full.

    Raises:
        InputError: the model is not sparse, or SHiRA cannot represent it: entries outside linear weights, or tied
            parameters; names the first such parameter and the number of such entries.
        RunError: the folder cannot be written.
    """
    state = sparse_state(model)
    if any_quantized(model):
        raise InputError("shira: found a quantised base, to which PEFT adds no sparse matrix", "merged", key="format")
    deltas, dense = trained_numbers(model)
    holders = _holders(model)
    whole = {_owner(name, holders[name]) for name in (*dense, *also)}
    layers = {name: state.mask.indices[name] for name in holders if name in deltas and not _inside(name, whole)}
    _refuse_all_but_linear(layers, holders, state.k)
    shapes = {name: state.mask.shapes[name] for name in layers}
    needed = {name: -(-len(index) // sum(shapes[name])) for name, index in layers.items()}
    r = _best_r(needed, {name: parameter for name, parameter in model.named_parameters() if name in layers})
    whole |= {name.removesuffix(".weight") for name in layers if not needed[name] <= r <= _largest_rank(shapes[name])}
    # PEFT stores every module whose name ends so, and `pre_classifier` ends in `classifier`.
    whole = {path for path, _ in model.named_modules() if whole and path.endswith(tuple(whole))}
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in _contents(model, sorted(whole), holders).items()}
    layers = {name: index for name, index in layers.items() if not _inside(name, whole)}
    if not layers:
        raise InputError("shira: found no linear weights that it can hold", "some, or format=merged", key="format")
    for name, index in layers.items():
        places_2K, values_K = _padded(index.long(), deltas[name], shapes[name], r)
        key = PREFIX + name.removesuffix(".weight")
        tensors |= {f"{key}.shira_indices": places_2K, f"{key}.shira_weight": values_K}
    _write(Path(folder), tensors, _config(model, r, layers, whole))
    stored = sum(r * sum(shapes[name]) for name in layers)
    return {"r": r, "layers": len(layers), "stored": stored, "whole": sorted(whole)}


def _config(model: nn.Module, r: int, layers: Iterable[str], whole: set[str]) -> dict[str, Any]:
    return {
        "peft_type": "SHIRA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        # With a task type PEFT would add further modules to save.
        "task_type": None,
        "inference_mode": True,
        "r": r,
        # A string is a regular expression of full names; a list would match endings.
        "target_modules": "|".join(re.escape(name.removesuffix(".weight")) for name in layers),
        "modules_to_save": sorted(whole) or None,
        "fan_in_fan_out": False,
        # Any word but `random`, with which PEFT would draw indices before it reads the file's.
        "mask_type": "irdscale",
    }


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    def fill(target: Path) -> None:
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(target / "adapter_config.json", config)

    write_folder(folder, fill)


Holders = list[tuple[str, nn.Module]]


def _holders(model: nn.Module) -> dict[str, Holders]:
    """Parameter name -> path and module of each holder; several if the parameter is tied."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held: dict[str, Holders] = {name: [] for name in names.values()}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                held[names[id(parameter)]].append((path, module))
    return held


def _owner(name: str, holders: Holders) -> str:
    """The module that holds a parameter which PEFT must store in full."""
    paths = [path for path, _ in holders]
    if len(paths) > 1:
        raise InputError(
            f"shira: {name}: must be stored in full and is tied ({', '.join(paths)}), which PEFT would untie",
            "format=merged",
            key="format",
        )
    if not paths[0]:
        raise InputError(
            f"shira: {name}: must be stored in full and is in no submodule, which PEFT cannot do",
            "format=merged",
            key="format",
        )
    return paths[0]


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _refuse_all_but_linear(layers: dict[str, Tensor], holders: dict[str, Holders], k: int) -> None:
    refused: list[tuple[str, str]] = []
    for name in layers:
        module = holders[name][0][1]
        kind = getattr(type(module), "_original", type(module))
        if len(holders[name]) > 1:
            refused.append((name, "a tied parameter"))
        elif kind is not nn.Linear or not name.endswith(".weight"):
            refused.append((name, f"the {name.rpartition('.')[2]} of a {kind.__name__}"))
    if refused:
        name, what = refused[0]
        count = sum(len(layers[each]) for each, _ in refused)
        raise InputError(
            f"shira: {name}: found {len(layers[name]):,} entries in {what}, and {count:,} of the mask's "
            f"{k:,} outside untied nn.Linear weights",
            "entries in those alone (see fisher.include), or format=merged",
            key="format",
        )


def _largest_rank(shape: tuple[int, ...]) -> int:
    """The largest r whose r (m + n) indices fit into a layer."""
    return shape[0] * shape[1] // (shape[0] + shape[1])


def _best_r(needed: dict[str, int], weights: dict[str, Tensor]) -> int:
    """The r with the smallest file: layers that it does not fit are stored in full, others are padded to it.

    Args:
        needed: name -> the smallest r that holds the layer's entries.
    """

    def size(r: int) -> int:
        """Bytes of all layers: per entry 8 for indices and 4 for the value (8 in float64), or the full weights."""
        total = 0
        for name, weight in weights.items():
            fits = needed[name] <= r <= _largest_rank(tuple(weight.shape))
            place = 16 if weight.dtype == torch.float64 else 12
            total += r * sum(weight.shape) * place if fits else weight.numel() * weight.element_size()
        return total

    fitting = {n for name, n in needed.items() if n <= _largest_rank(tuple(weights[name].shape))}
    return min(sorted(fitting, reverse=True), key=size, default=0)


def _padded(index: Tensor, values: Tensor, shape: tuple[int, ...], r: int) -> tuple[Tensor, Tensor]:
    """r (m + n) distinct indices [2, K] of a layer, sorted, and their values [K]; 0 outside the mask."""
    count = r * sum(shape)
    # At most len(index) of the first `count` places are in the mask, so enough of them are free.
    free = torch.ones(count, dtype=torch.bool)
    free[index[index < count]] = False
    padding = free.nonzero().view(-1)[: count - len(index)]
    places, order = torch.cat([index, padding]).sort()
    rows_columns = torch.stack([places // shape[1], places % shape[1]]).to(torch.int32)
    return rows_columns, torch.cat([values, values.new_zeros(len(padding))])[order]


def _contents(model: nn.Module, paths: Iterable[str], holders: dict[str, Holders]) -> dict[str, Tensor]:
    """Parameters and buffers of modules, with effective weights."""
    state = sparse_state(model)
    values = {id(entries.values) for entries in state.patched}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for entries in state.patched:
        entries.patch()
    tensors = {}
    for path in paths:
        module = model.get_submodule(path)
        for parameter in module.parameters():
            if id(parameter) not in values:
                _owner(names[id(parameter)], holders[names[id(parameter)]])
        trained = {name for name, parameter in module.named_parameters() if id(parameter) in values}
        for name, tensor in module.state_dict().items():
            if name not in trained:
                tensors[f"{path}.{name}"] = tensor.detach().to("cpu", copy=True)
    return tensors
