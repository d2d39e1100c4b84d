"""Adapters of linear layers by PEFT, for comparison with masks.

LoRA (Hu et al. 2021, arXiv 2106.09685), also with the rank-stabilised scale (rsLoRA, Kalajdzievski 2023, arXiv
2312.03732).
"""

from __future__ import annotations

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
    """Add LoRA matrices to the linear layers that `lora.targets` names, in place; without dropout.

    Args:
        lora: its options; the rank is a number.
        seed: seed of the initial weights; the global random state does not change.
        dense: names of the parameters trained densely; their layers get no matrices.

    Returns:
        Names of the matrices.

    Raises:
        InputError: PEFT is missing, the model is partitioned by ZeRO-3, or it has no such linear layer.
    """
    targets = list(lora_layers(model, lora, dense))
    import peft

    assert isinstance(lora.rank, int)
    options: dict[str, Any] = {"lora_alpha": lora.alpha or 2 * lora.rank, "use_rslora": lora.rslora}
    config = peft.LoraConfig(r=lora.rank, target_modules=targets, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, cast(Any, model))
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def lora_layers(model: nn.Module, lora: LoraConfig, dense: Collection[str]) -> dict[str, tuple[int, int]]:
    """Name -> outputs and inputs of each linear layer that `insert_lora` adds matrices to.

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
    layers = {
        name: _shape(module)
        for name, module in model.named_modules()
        if (type(module).__name__ in ("Linear", "Conv1D") or dequantizes(type(module)))
        and module is not head
        and not any(f"{name}.{own}" in dense for own, _ in module.named_parameters(recurse=False))
    }
    if not layers:
        raise InputError(f"found no linear layer in {type(model).__name__}", "at least one", "lora")
    if lora.targets is None:
        return layers
    for end in lora.targets:
        if not any(_ends(name, end) for name in layers):
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            found = f"found {end!r}{nearest(end, ends)}, which names no linear layer"
            raise InputError(found, f"names or their ends, such as {', '.join(ends)}", "compare.lora.targets")
    return {name: shape for name, shape in layers.items() if any(_ends(name, end) for end in lora.targets)}


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _shape(module: nn.Module) -> tuple[int, int]:
    layer = cast(Any, module)
    return (layer.nf, layer.weight.shape[0]) if hasattr(layer, "nf") else (layer.out_features, layer.in_features)


def lora_size(layers: dict[str, tuple[int, int]], rank: int) -> int:
    """Parameters of LoRA matrices of this rank in these layers: rank (outputs + inputs) each."""
    return rank * sum(map(sum, layers.values()))


def nearest_rank(layers: dict[str, tuple[int, int]], budget: int) -> int:
    """The rank whose parameters are nearest to `budget`, at least 1."""
    return max(1, round(budget / lora_size(layers, 1)))
