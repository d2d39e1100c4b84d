"""Peak memory of one training step by kind, for comparison with measured peaks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.errors import InputError
from irdscale.memory.pass_bytes import counting, down_to_embeddings, sparse_entries
from irdscale.memory.shapes import layer_stack
from irdscale.memory.sizes import StepKind


def step_peak(model: nn.Module, kind: StepKind, batch: int, tokens: int, ratio: float = 0.005, rank: int = 8) -> int:
    """Peak bytes on a GPU of any step but the first, including the model and AdamW's moments.

    The step is `model(input_ids=..., labels=...).loss.backward()` without padding, with the model's own loss: the
    float32 logits of all tokens at once. Gradients are freed before the forward pass (`zero_grad(set_to_none=True)`).
    Workspaces of libraries and the allocator's rounding are left out.

    Args:
        model: transformers model on the meta device; left unchanged.
        kind: trained parameters of the step: none (`limit`), entries of all linear layers of the stack (`concentrated`,
            `scattered`), float32 LoRA matrices there (`lora`), or all parameters (`full`).
        batch, tokens: samples, and tokens of each.
        ratio: trained entries over all entries of those layers.
        rank: rank of the LoRA matrices.

    Raises:
        InputError: PEFT is not installed, or the model has no stack of layers.
    """
    own: Any = copy.deepcopy(model)
    with ExitStack() as stack:
        matrices = _matrices(own)
        before: list[Tensor] = []
        if kind in ("concentrated", "scattered"):
            scored = {name: own.get_parameter(name) for name in (f"{module}.weight" for module in matrices)}
            entries = stack.enter_context(sparse_entries(own, scored, ratio, kind == "scattered"))
            before = [t for held in entries for t in (held.index, held.base)]
        elif kind == "lora":
            own = _with_lora(own, matrices, rank)
        else:
            own.requires_grad_(kind == "full")
        stack.enter_context(down_to_embeddings(own))
        trained = [p for p in own.parameters() if p.requires_grad]
        # Two moments per trained parameter, in its dtype.
        held = _bytes([*own.parameters(), *own.buffers(), *before]) + 2 * _bytes(trained)
        live = stack.enter_context(counting(own, before, on_gpu=True))
        ids_BT = torch.empty(batch, tokens, dtype=torch.int64, device="meta")
        text = own.get_output_embeddings() is not None
        labels = ids_BT if text else torch.empty(batch, dtype=torch.int64, device="meta")
        own(input_ids=ids_BT, labels=labels).loss.backward()
    return held + live.peak


def _matrices(model: nn.Module) -> list[str]:
    """Names of the linear layers in the stack of layers."""
    name, layers = layer_stack(model)
    return [f"{name}.{inner}" for inner, module in layers.named_modules() if isinstance(module, nn.Linear)]


def _with_lora(model: Any, matrices: list[str], rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError(f"needs the package peft (pip install peft): {error}", key="lora") from error
    return get_peft_model(model, LoraConfig(r=rank, target_modules=matrices))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
