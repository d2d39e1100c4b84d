"""Sparse training steps against full fine-tuning, LoRA, SHiRA and the limit, and their memory.

The limit is a forward pass and the input gradients, down to the embeddings, with nothing trainable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from irdscale.bench.models import (
    BATCH,
    HEAD,
    Step,
    adamw,
    collate,
    fisher_mask,
    make_model,
    make_rows,
    sparse_model,
    training_step,
)
from irdscale.bench.timing import figure, row, side_by_side
from irdscale.bench.trainer import trainer_row
from irdscale.bench.zero import bench_zero
from irdscale.errors import InputError
from irdscale.fisher import Fisher
from irdscale.masks.mask import Mask, top_k
from irdscale.sparse import entries_of, sparsify
from irdscale.sparse.functions import needed_input
from irdscale.sparse.products import Side

MODELS = ("bert", "llama")
TOKENS = 128
REPEATS = 9
TARGETS = {
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
TRAINER_BAR = 1.03
FULL_BARS = {"bert": 0.80, "llama": 0.74}


def bench_train(advance: Callable[..., None]) -> list[dict[str, Any]]:
    """Rows of every model. All training steps use PyTorch's fused AdamW."""
    rows = []
    for name in MODELS:
        data = make_rows(TOKENS)
        batch = collate(data)
        mask = fisher_mask(name, data)
        scattered = random_mask(make_model(name), mask.k)
        steps = {
            "sparse": training_step(sparse_model(name, mask), batch),
            "random": training_step(sparse_model(name, scattered), batch),
            "top": training_step(sparse_model(name, fisher_mask(name, data, top_half=True)), batch),
            "full": training_step(make_model(name), batch),
            "limit": _limit(make_model(name), batch),
            "lora": training_step(_with_lora(name), batch),
            "shira": training_step(_with_shira(name, mask.k), batch),
        }
        seconds = side_by_side(steps, REPEATS)
        for what, over, under, bar in (
            ("sparse step / the limit (forward + input gradients)", "sparse", "limit", 1.08),
            ("sparse step / full fine-tuning step", "sparse", "full", FULL_BARS[name]),
            ("sparse step / LoRA r=8 step (PEFT)", "sparse", "lora", 0.95),
            ("sparse step / SHiRA step of equal k (PEFT)", "sparse", "shira", 1.0),
            ("sparse step, random mask / the limit", "random", "limit", 1.15),
            ("sparse step, mask in the top half of the layers / full fine-tuning step", "top", "full", 0.60),
        ):
            rows.append(row("train", what, name, TOKENS, seconds, over, under, limit=bar))
        rows += _memory_rows(name, mask, batch)
        if name == "llama":
            rows.append(trainer_row(name, sparse_model(name, mask), BATCH, TOKENS, TRAINER_BAR))
        advance()
    rows += bench_zero()
    advance()
    return rows


def random_mask(model: nn.Module, k: int) -> Mask:
    """k scattered entries, drawn uniformly from all matrices outside the head."""
    generator = torch.Generator().manual_seed(0)
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2 and not re.search(HEAD, n)}
    scores = {name: torch.rand(matrix.shape, generator=generator) for name, matrix in matrices.items()}
    return top_k(Fisher(scores, torch.zeros(0, dtype=torch.float64)), k)


def _limit(model: Any, batch: dict[str, Tensor]) -> Step:
    """Forward and input gradients with nothing trainable: a lower bound for training these layers."""
    model.requires_grad_(False)
    root = torch.zeros((), requires_grad=True)
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, y: _Enter.apply(y, root))
    return training_step(model, batch, trains=False)


def _with_lora(name: str) -> Any:
    peft = _peft()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=TARGETS[name])
    return peft.get_peft_model(make_model(name), config).eval()


def _with_shira(name: str, k: int) -> Any:
    """SHiRA trains r (in + out) entries of each linear layer; r makes their sum nearest to k."""
    peft, model = _peft(), make_model(name)
    ends = tuple(TARGETS[name])
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(ends)]
    rank = round(k / sum(m.in_features + m.out_features for m in layers))
    largest = min(m.weight.numel() // (m.in_features + m.out_features) for m in layers)
    config = peft.ShiraConfig(task_type="SEQ_CLS", r=min(max(1, rank), largest), target_modules=TARGETS[name])
    return peft.get_peft_model(model, config).eval()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("bench train: found no peft", "it installed (pip install peft)") from None
    return peft


class _Enter(torch.autograd.Function):
    """Returns its first argument, and drops that one's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, root: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None]:
        return None, None


class _Hold(torch.autograd.Function):
    """Returns its first argument, and keeps the second until the backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def _hold_input(columns: Side, _module: nn.Module, args: tuple[Tensor], y: Tensor) -> Any:
    return _Hold.apply(y, needed_input(args[0].detach(), columns))


def _memory_rows(name: str, mask: Mask, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Peak memory of a sparse step above the frozen model and activations, and the bytes of the mask itself.

    The peak counts all live bytes of PyTorch's CPU allocator, temporaries inside operations included. The peak of a
    limit step is subtracted, in which layers with entries keep as much of their inputs as in the sparse step (the
    activations). Values and moments, allocated before the step, are added. The head is not trained here, because its
    gradients and moments do not belong to the mask.
    """
    frozen, sparse = make_model(name), sparsify(make_model(name), mask)
    held_by = {n.removesuffix(".weight"): e for n, e in entries_of(sparse).items() if n.endswith(".weight")}
    for module_name, module in frozen.named_modules():
        if module_name not in held_by:
            continue
        if isinstance(module, nn.Linear):
            module.register_forward_hook(partial(_hold_input, held_by[module_name].product.columns))
        elif "RMSNorm" in type(module).__name__:
            # Multiplies by its weight in a separate operation, which keeps its input.
            module.register_forward_hook(lambda _module, _args, y: _Hold.apply(y, y.detach().clone()))
    limit = _limit(frozen, batch)
    optimizer = adamw(sparse)

    def step() -> None:
        sparse(**batch).loss.backward()
        optimizer.step()

    limit()
    step()
    optimizer.zero_grad(set_to_none=True)
    held = [e.values for e in entries_of(sparse).values()]
    held += [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    peaks = [_peak(limit), _peak(step) + _bytes(held)]
    entries = entries_of(sparse).values()
    own = {"index": _bytes(e.index for e in entries), "base": _bytes(e.base for e in entries)}
    own["places"] = _bytes(t for e in entries if e._product is not None for t in e._product.tensors())
    return [
        _counted("peak memory above model and activations / 16 B x k", name, peaks[1] - peaks[0], 16 * mask.k, 1.05),
        _counted("the mask's own bytes (index, base, places) / k", name, sum(own.values()), mask.k),
    ]


def _peak(step: Callable[[], None]) -> int:
    """Peak of the live bytes in a step, above those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [e for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _counted(what: str, model: str, over: int, under: int, limit: float | None = None) -> dict[str, Any]:
    """A row of counted bytes, which do not vary between repeats."""
    return figure("train", what, model, TOKENS, round(over / under, 3), limit=limit)
