"""The peak memory of one training step by what is trained of a model, to be compared with a measured one."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.errors import InputError
from irdscale.plan.rates import StepKind
from irdscale.plan.shapes import layer_stack
from irdscale.plan.trace import counting, down_to_embeddings, sparse_entries


def step_peak(model: nn.Module, kind: StepKind, batch: int, tokens: int, ratio: float = 0.005, rank: int = 8) -> int:
    """Bytes on a GPU at the peak of a step that is not the first one, the model's and AdamW's own included.

    The step is `model(input_ids=..., labels=...).loss.backward()` without padding: a language model's own loss, which
    has the logits of all tokens in float32 at once. Gradients are gone before the forward pass
    (`zero_grad(set_to_none=True)`). Left out are workspaces of libraries and what an allocator rounds up.

    Args:
        model: of transformers, on the meta device; it is left as it was.
        kind: what is trained: nothing (`limit`), entries of all linear layers in the stack of layers (`concentrated`,
            `scattered`), LoRA matrices there in float32, as PEFT makes them (`lora`), or everything (`full`).
        tokens: of each of the `batch` samples.
        ratio: of the trained entries to all of those layers.
        rank: of LoRA.

    Raises:
        InputError: PEFT is missing, or the model has no stack of layers.
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
        # Two moments of each number, in its type.
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
        raise InputError(f"lora: needs the package peft (pip install irdscale[compare]): {error}") from error
    return get_peft_model(model, LoraConfig(r=rank, target_modules=matrices))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
