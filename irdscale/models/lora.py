"""LoRA matrices (Hu et al. 2021, arXiv 2106.09685) by PEFT, for comparison with masks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from irdscale.distributed.zero3 import is_partitioned
from irdscale.errors import InputError
from irdscale.models.quantized import dequantizes


def insert_lora(model: nn.Module, rank: int, seed: int, dense: Collection[str]) -> list[str]:
    """Add LoRA matrices to every linear layer except the heads, in place; alpha is twice the rank; no dropout.

    Args:
        seed: seed of their initial weights; the global random state does not change.
        dense: names of the parameters trained densely; their layers get no matrices.

    Returns:
        Names of the matrices.

    Raises:
        InputError: PEFT is missing, the model is partitioned by ZeRO-3, or it has no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(f"needs the package peft (pip install peft): {error}", key="lora") from error
    if is_partitioned(model):
        raise InputError("found a model in ZeRO-3 partitions", "ZeRO 0-2, or none", "lora")
    head = cast(Any, model).get_output_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if (type(module).__name__ in ("Linear", "Conv1D") or dequantizes(type(module)))
        and module is not head
        and not any(f"{name}.{own}" in dense for own, _ in module.named_parameters(recurse=False))
    ]
    if not targets:
        raise InputError(f"found no linear layer in {type(model).__name__}", "at least one", "lora")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), cast(Any, model))
    return [name for name, _ in model.named_parameters() if ".lora_" in name]
