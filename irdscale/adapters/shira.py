"""Adapters for PEFT's SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175), which stock PEFT loads onto the base model.

SHiRA adds one sparse matrix to each linear layer's weight: int32 places and as many values, r (m + n) of them in every
m x n layer, with one r for all layers. The scale is 1 and the sum is rounded to the weight's type, so the effective
weights are those of the sparse model. Layers with fewer entries are padded with zeros outside the mask.
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
    """Write a sparse model's trained numbers as a PEFT adapter: adapter_config.json and adapter_model.safetensors.

    `PeftModel.from_pretrained(base, folder)` then gives the sparse model's logits, bit for bit, if `base` holds the
    same weights: PEFT does not check that. On a bfloat16 or float16 base, its options `autocast_adapter_dtype=False`
    and `low_cpu_mem_usage=True` round the values to the base's type first.

    Modules that hold parameters trained whole go to `modules_to_save`, and so do layers that r (m + n) places do not
    fit: crowded ones and small ones. r is what makes the file smallest. The model stays as it is.

    Args:
        also: names of parameters to store whole besides, such as a new head that the base checkpoint does not hold.

    Returns:
        {"r", "layers", "stored", "whole"}: r, layers with a sparse matrix, places stored in them, modules stored whole.

    Raises:
        InputError: the model is not sparse, or PEFT has no way to say it: entries outside of linear weights, or tied
            parameters; names the first such parameter, and how many entries there are.
        RunError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    state = sparse_state(model)
    if any_quantized(model):
        raise InputError(
            "format: shira: found a quantised base, into which PEFT adds no sparse matrix; expected merged"
        )
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
        raise InputError("format: shira: found no linear weights that it can hold; expected some, or format=merged")
    for name, index in layers.items():
        places_2K, values_K = _padded(index.long(), deltas[name], shapes[name], r)
        key = PREFIX + name.removesuffix(".weight")
        tensors |= {f"{key}.shira_indices": places_2K, f"{key}.shira_weight": values_K}
    config = {
        "peft_type": "SHIRA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        # A task type would add modules to save of PEFT's own choice.
        "task_type": None,
        "inference_mode": True,
        "r": r,
        # A string is a regular expression for the whole name; a list would be of endings.
        "target_modules": "|".join(re.escape(name.removesuffix(".weight")) for name in layers),
        "modules_to_save": sorted(whole) or None,
        "fan_in_fan_out": False,
        # Any other word than `random`: the places come from the file, and PEFT need not draw some first.
        "mask_type": "irdscale",
    }

    def fill(target: Path) -> None:
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(target / "adapter_config.json", config)

    write_folder(folder, fill)
    stored = sum(r * sum(shapes[name]) for name in layers)
    return {"r": r, "layers": len(layers), "stored": stored, "whole": sorted(whole)}


Holders = list[tuple[str, nn.Module]]


def _holders(model: nn.Module) -> dict[str, Holders]:
    """Parameter name -> the path of every module that holds it, and the module; more than one if it is tied."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held: dict[str, Holders] = {name: [] for name in names.values()}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                held[names[id(parameter)]].append((path, module))
    return held


def _owner(name: str, holders: Holders) -> str:
    """The module that holds a parameter which PEFT must store whole."""
    paths = [path for path, _ in holders]
    if len(paths) > 1:
        raise InputError(
            f"format: shira: {name}: must be stored whole and is tied ({', '.join(paths)}), which PEFT would untie; "
            f"expected format=merged"
        )
    if not paths[0]:
        raise InputError(
            f"format: shira: {name}: must be stored whole and lies in no module below the model, which PEFT cannot do; "
            f"expected format=merged"
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
            f"format: shira: {name}: found {len(layers[name]):,} entries in {what}; expected entries in untied weights "
            f"of nn.Linear alone, as PEFT has it: {count:,} of the mask's {k:,} lie elsewhere (choose them with "
            f"fisher.include, or use format=merged)"
        )


def _largest_rank(shape: tuple[int, ...]) -> int:
    """The largest r that a layer has places for."""
    return shape[0] * shape[1] // (shape[0] + shape[1])


def _best_r(needed: dict[str, int], weights: dict[str, Tensor]) -> int:
    """The r with the smallest file: layers that it does not fit are stored whole, all others are padded to it.

    Args:
        needed: name -> the smallest r that holds the layer's entries.
    """

    def size(r: int) -> int:
        """Bytes: 8 of places and 4 (8 for a float64 weight) of values an entry, or the weights themselves."""
        total = 0
        for name, weight in weights.items():
            fits = needed[name] <= r <= _largest_rank(tuple(weight.shape))
            place = 16 if weight.dtype == torch.float64 else 12
            total += r * sum(weight.shape) * place if fits else weight.numel() * weight.element_size()
        return total

    fitting = {n for name, n in needed.items() if n <= _largest_rank(tuple(weights[name].shape))}
    return min(sorted(fitting, reverse=True), key=size, default=0)


def _padded(index: Tensor, values: Tensor, shape: tuple[int, ...], r: int) -> tuple[Tensor, Tensor]:
    """r (m + n) distinct places [2, K] of a layer, sorted, and their values [K]; 0 outside the mask."""
    count = r * sum(shape)
    # Of the first `count` places at most len(index) are taken, so enough of them are free.
    free = torch.ones(count, dtype=torch.bool)
    free[index[index < count]] = False
    padding = free.nonzero().view(-1)[: count - len(index)]
    places, order = torch.cat([index, padding]).sort()
    rows_columns = torch.stack([places // shape[1], places % shape[1]]).to(torch.int32)
    return rows_columns, torch.cat([values, values.new_zeros(len(padding))])[order]


def _contents(model: nn.Module, paths: Iterable[str], holders: dict[str, Holders]) -> dict[str, Tensor]:
    """The parameters and buffers of modules, as they are with the trained numbers."""
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
