"""Adapters of linear layers by PEFT, for comparison with masks.

LoRA (Hu et al. 2021, arXiv 2106.09685), also with the rank-stabilised scale (rsLoRA, Kalajdzievski 2023, arXiv
2312.03732); DoRA (Liu et al. 2024, arXiv 2402.09353); SHiRA with random entries (Bhardwaj et al. 2024, arXiv
2406.13175).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from irdscale.config.compare import LoraConfig
from irdscale.distributed.zero3 import is_partitioned
from irdscale.errors import InputError
from irdscale.models.quantized import dequantizes
from irdscale.utils.suggestions import nearest


def insert_lora(model: nn.Module, lora: LoraConfig, seed: int, dense: Collection[str]) -> list[str]:
    """Add an adapter to the linear layers that `lora.targets` names, in place; without dropout.

    Args:
        lora: its options; the rank is a number.
        seed: seed of the initial weights, or of SHiRA's entries; the global random state does not change.
        dense: names of the parameters trained densely; their layers get no adapter.

    Returns:
        Names of the adapter's parameters.

    Raises:
        InputError: PEFT is missing, the model is partitioned by ZeRO-3, or it has no such linear layer.
    """
    targets = list(lora_layers(model, lora, dense))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        from peft import inject_adapter_in_model

        inject_adapter_in_model(_peft_config(lora, targets, seed), cast(Any, model))
    return [name for name, _ in model.named_parameters() if ".lora_" in name or ".shira_" in name]


def _peft_config(lora: LoraConfig, targets: list[str], seed: int) -> Any:
    import peft

    assert isinstance(lora.rank, int)
    options: dict[str, Any] = {"r": lora.rank, "target_modules": targets}
    if lora.form == "shira":
        # PEFT's forward pass makes torch say so.
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        return peft.ShiraConfig(random_seed=seed, **options)
    options |= {"lora_alpha": lora.alpha or 2 * lora.rank, "use_rslora": lora.rslora}
    return peft.LoraConfig(use_dora=lora.form == "dora", **options)


def lora_layers(model: nn.Module, lora: LoraConfig, dense: Collection[str]) -> dict[str, tuple[int, int]]:
    """Name -> outputs and inputs of each linear layer that `insert_lora` adds an adapter to.

    Raises:
        InputError: as `insert_lora`.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise InputError(f"needs the package peft (pip install peft): {error}", key="lora") from error
    if is_partitioned(model):
        raise InputError("found a model in ZeRO-3 partitions", "ZeRO 0-2, or none", "lora")
    head = cast(Any, model).get_output_embeddings()
    modules = {
        name: module
        for name, module in model.named_modules()
        if (type(module).__name__ in ("Linear", "Conv1D") or dequantizes(type(module)))
        and module is not head
        and not any(f"{name}.{own}" in dense for own, _ in module.named_parameters(recurse=False))
    }
    if not modules:
        raise InputError(f"found no linear layer in {type(model).__name__}", "at least one", "lora")
    for end in lora.targets or ():
        if not any(_ends(name, end) for name in modules):
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
            found = f"found {end!r}{nearest(end, ends)}, which names no linear layer"
            raise InputError(found, f"names or their ends, such as {', '.join(ends)}", "compare.lora.targets")
    chosen = {n: m for n, m in modules.items() if lora.targets is None or any(_ends(n, end) for end in lora.targets)}
    _refuse_unknown(lora, chosen)
    return {name: _shape(module) for name, module in chosen.items()}


def _refuse_unknown(lora: LoraConfig, layers: dict[str, nn.Module]) -> None:
    """Refuse layers for which PEFT lacks this form of adapter, or whose weights it would dequantise differently."""
    for name, module in layers.items():
        quantized = dequantizes(type(module))
        if (lora.form != "lora" and quantized) or (lora.form == "shira" and type(module) is not nn.Linear):
            what = "quantised weights" if quantized else f"a {type(module).__name__}"
            raise InputError(f"found {lora.form} for {name}, with {what}", "lora", "compare.lora.form")


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _shape(module: nn.Module) -> tuple[int, int]:
    layer = cast(Any, module)
    return (layer.nf, layer.weight.shape[0]) if hasattr(layer, "nf") else (layer.out_features, layer.in_features)


def lora_size(layers: dict[str, tuple[int, int]], lora: LoraConfig, rank: int) -> int:
    """Trained parameters of an adapter in these layers: rank (outputs + inputs) each, and for DoRA the outputs too."""
    norms = sum(outputs for outputs, _ in layers.values()) if lora.form == "dora" else 0
    return rank * sum(map(sum, layers.values())) + norms


def lora_rank(layers: dict[str, tuple[int, int]], lora: LoraConfig, budget: int) -> int:
    """The adapter's rank, at least 1; for rank `auto` the one whose trained parameters are nearest to `budget`.

    Raises:
        InputError: SHiRA would have more entries than a layer.
    """
    most, name = min((out * into // (out + into), name) for name, (out, into) in layers.items())
    if lora.form == "shira" and most < (1 if lora.rank == "auto" else lora.rank):
        raise InputError(f"found {lora.rank}, more entries than {name} has", f"at most {most}", "compare.lora.rank")
    if lora.rank != "auto":
        return lora.rank
    fixed = lora_size(layers, lora, 0)
    rank = max(1, round((budget - fixed) / (lora_size(layers, lora, 1) - fixed)))
    return min(rank, most) if lora.form == "shira" else rank
