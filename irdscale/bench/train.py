"""Sparse training steps against full fine-tuning, LoRA, SHiRA and the limit, and the memory that one takes.

The limit is a forward pass and the input gradients alone, down to the embeddings, with nothing trainable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from irdscale.bench.models import BATCH, collate, make_model, make_rows
from irdscale.bench.timing import figure, row, side_by_side
from irdscale.bench.trainer import trainer_row
from irdscale.bench.zero import bench_zero
from irdscale.errors import InputError
from irdscale.fisher import accumulate_fisher
from irdscale.masks.mask import Mask, index_dtype, top_k
from irdscale.sparse import entries_of, sparsify
from irdscale.sparse.functions import needed_input
from irdscale.sparse.products import Side

MODELS = ("bert", "llama")
TOKENS = 128
REPEATS = 9
RATIO = 0.005
HEAD = r"^(classifier|score)\."
TARGETS = {
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
TRAINER_BAR = 1.03
FULL_BARS = {"bert": 0.80, "llama": 0.74}


def bench_train(advance: Callable[..., None]) -> list[dict[str, Any]]:
    """Rows of every model. All steps that train use PyTorch's fused AdamW."""
    rows = []
    for name in MODELS:
        data = make_rows(TOKENS)
        batch = collate(data)
        mask = _fisher_mask(name, data)
        scattered = random_mask(make_model(name), mask.k)
        steps = {
            "sparse": _step(_sparse(name, mask), batch),
            "random": _step(_sparse(name, scattered), batch),
            "top": _step(_sparse(name, _fisher_mask(name, data, top_half=True)), batch),
            "full": _step(make_model(name), batch),
            "limit": _limit(make_model(name), batch),
            "lora": _step(_with_lora(name), batch),
            "shira": _step(_with_shira(name, mask.k), batch),
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
            rows.append(trainer_row(name, _sparse(name, mask), BATCH, TOKENS, TRAINER_BAR))
        advance()
    rows += bench_zero()
    advance()
    return rows


def _fisher_mask(name: str, data: list[dict[str, Any]], top_half: bool = False) -> Mask:
    model = make_model(name)
    layers = model.config.num_hidden_layers
    upper = "|".join(str(layer) for layer in range(layers // 2, layers))
    include = [rf"layers?\.({upper})\."] if top_half else None
    fisher = accumulate_fisher(model, data, collate_fn=collate, include=include, exclude=HEAD)
    scored = sum(torch.Size(shape).numel() for shape in fisher.shapes.values())
    return top_k(fisher, min(scored, round(RATIO * sum(p.numel() for p in model.parameters()))))


def random_mask(model: nn.Module, k: int, seed: int = 0) -> Mask:
    """k entries drawn from all matrices outside the head alike: a mask whose entries scatter."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.dim() == 2 and not re.search(HEAD, n)}
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    drawn = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))[:k].sort().values
    indices, start = {}, 0
    for name, size in zip(shapes, sizes, strict=True):
        inside = drawn[(drawn >= start) & (drawn < start + size)] - start
        if len(inside):
            indices[name] = inside.to(index_dtype(size))
        start += size
    return Mask(indices, shapes)


def _sparse(name: str, mask: Mask) -> Any:
    model = sparsify(make_model(name), mask, always_train=[HEAD])
    assert all(entries.values.requires_grad for entries in entries_of(model).values())
    return model


def _step(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = _optimizer(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()

    return step


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def _limit(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and input gradients, nothing trainable: what no training of these layers can beat."""
    model.requires_grad_(False)
    root = torch.zeros((), requires_grad=True)
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, y: _Enter.apply(y, root))

    def step() -> None:
        model(**batch).loss.backward()

    return step


def _with_lora(name: str) -> Any:
    peft = _peft()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=TARGETS[name])
    return peft.get_peft_model(make_model(name), config).eval()


def _with_shira(name: str, k: int) -> Any:
    """SHiRA trains r (in + out) entries of each linear layer: r such that all are nearest to k."""
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
        raise InputError("bench train: found no peft; expected it installed (pip install 'irdscale[bench]')") from None
    return peft


class _Enter(torch.autograd.Function):
    """Its first argument, whose gradient is asked for and dropped."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, root: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None]:
        return None, None


class _Hold(torch.autograd.Function):
    """Its first argument; holds the second until the backward pass comes by."""

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
    """Peak memory of a sparse step above the frozen model and activations, and what the mask itself keeps.

    Counted are all bytes that PyTorch's CPU allocator gives out in a step and has not taken back, temporaries inside
    operations included. From the sparse step's peak goes the peak of the limit's step in which the layers that have
    entries hold as much of their inputs as the sparse ones do (the activations); values and moments, which exist
    before the step, are added. The head is not trained here, for its gradients and moments are not the mask's.
    """
    frozen, sparse = make_model(name), sparsify(make_model(name), mask)
    held_by = {n.removesuffix(".weight"): e for n, e in entries_of(sparse).items() if n.endswith(".weight")}
    for module_name, module in frozen.named_modules():
        if module_name not in held_by:
            continue
        if isinstance(module, nn.Linear):
            module.register_forward_hook(partial(_hold_input, held_by[module_name].product.columns))
        elif "RMSNorm" in type(module).__name__:
            # Multiplies by its weight in a step of its own.
            module.register_forward_hook(lambda _module, _args, y: _Hold.apply(y, y.detach().clone()))
    limit = _limit(frozen, batch)
    optimizer = _optimizer(sparse)

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
    """The most bytes that are live at once in a step, above those before it."""
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
    """A row of counted bytes, which do not vary."""
    return figure("train", what, model, TOKENS, round(over / under, 3), limit=limit)
