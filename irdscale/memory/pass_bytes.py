"""Count the bytes that a pass keeps and allocates, by running its code on the meta device.

Tensors there have shapes but no values; their bytes count until they are freed. A few layers run, and the others are
extrapolated, because equal layers keep equal bytes. Operations that need values are replaced: attention kernels (which
keep no [T, T] matrix), the sums of an embedding's rows, and a language model's loss.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Literal, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from irdscale.distributed.zero3 import numel_of, shape_of
from irdscale.fisher import affine
from irdscale.fisher.capture import Capture, frozen
from irdscale.fisher.squares import Buffers, add_squares, add_traces
from irdscale.fisher.terms import Outer, TableRows, Term
from irdscale.masks.mask import index_dtype
from irdscale.memory.shapes import layer_stack
from irdscale.memory.sizes import PassBytes, PassSetting, columns_held
from irdscale.models.chunked_losses import tokens_at_once
from irdscale.sparse.entries import Entries, make_entries
from irdscale.sparse.modules import attach_all, detach_all
from irdscale.sparse.products import Product, Side

Pass = Literal["train", "masks", "traces", "evaluate"]
# Numbers of layers that run; the difference is one layer's bytes.
FEW, MORE = 2, 3


def cached_pass_bytes(model: nn.Module, scored: dict[str, nn.Parameter]) -> Callable[[str, PassSetting], PassBytes]:
    """`pass_bytes_of` for one model, with a cache."""
    return cache(lambda kind, setting: pass_bytes_of(model, scored, kind, setting))


class Live(TorchDispatchMode):
    """Counts the bytes of meta tensors that are made inside and not yet freed."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            # Models test whether a batch has no padding and no packing.
            return args[0].dtype == torch.bool
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, key, size).atexit = False

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def pass_bytes_of(model: nn.Module, scored: dict[str, nn.Parameter], kind: Pass, setting: PassSetting) -> PassBytes:
    """Bytes of a pass over one batch.

    Args:
        model: model on the meta device; left unchanged.
        kind: `train` (forward and backward pass of a sparse training step), `masks` (the pass that sums squared
            gradients), `traces` (the pass for each sample's Fisher trace) or `evaluate` (predictions).
    """
    name, layers = layer_stack(model)
    parent, _, local = name.rpartition(".")
    owner, every = model.get_submodule(parent), list(layers)

    def of(count: int) -> PassBytes:
        owner._modules[local] = nn.ModuleList(every[:count])
        try:
            present = {n: p for n, p in model.named_parameters() if n in scored}
            if kind == "train":
                return _train(model, present, setting)
            return _evaluate(model, setting) if kind == "evaluate" else _fisher(model, present, kind, setting)
        finally:
            owner._modules[local] = layers

    if len(every) <= MORE:
        return of(len(every))
    few = of(FEW)
    return few + (of(MORE) - few) * (len(every) - FEW)


def _fisher(model: Any, scored: dict[str, nn.Parameter], kind: Pass, setting: PassSetting) -> PassBytes:
    totals = {name: torch.empty(shape_of(p), dtype=torch.float32, device="meta") for name, p in scored.items()}
    traces_B = torch.empty(setting.batch, dtype=torch.float64, device="meta")
    buffers = Buffers()

    def arrive(name: str, terms: list[Term]) -> None:
        if any(isinstance(term, TableRows) for term in terms):
            _add_rows(next(term for term in terms if isinstance(term, TableRows)))
        elif kind == "traces":
            add_traces(terms, totals[name].shape, traces_B, buffers)
        elif not (setting.on_gpu and isinstance(terms[0], Outer)):
            add_squares(terms, totals[name], None, buffers)

    _know_norms(model)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        if setting.checkpointing:
            stack.enter_context(_checkpointing(model))
        capture = stack.enter_context(Capture(model, scored))
        live = stack.enter_context(counting(model, [*totals.values(), traces_B], setting.on_gpu))
        inputs = _inputs(setting)
        if setting.language:
            capture.begin(setting.batch)
            losses_B = _text_loss(model, inputs, setting)
        else:
            losses_B = _class_loss(capture.forward(inputs, setting.batch).logits)
        saved = live.live
        capture.backward(losses_B, arrive)
        buffers.forget()
    return PassBytes(saved, live.peak)


def _train(model: Any, scored: dict[str, nn.Parameter], setting: PassSetting) -> PassBytes:
    with ExitStack() as stack:
        entries = stack.enter_context(sparse_entries(model, scored, setting.ratio, setting.scattered))
        model.train()
        stack.callback(model.eval)
        if setting.checkpointing:
            stack.enter_context(_checkpointing(model, use_reentrant=False))
        # Row sums of embeddings need values, so embeddings get no entries; gradients still reach their outputs.
        stack.enter_context(down_to_embeddings(model))
        live = stack.enter_context(counting(model, [t for e in entries for t in (e.index, e.base)], setting.on_gpu))
        inputs = _inputs(setting)
        for held in entries:
            held.patch()
        loss = _text_loss(model, inputs, setting) if setting.language else _class_loss(model(**inputs).logits)
        saved = live.live
        loss.mean().backward()
        for parameter in model.parameters():
            parameter.grad = None
    return PassBytes(saved, live.peak)


@contextmanager
def down_to_embeddings(model: nn.Module) -> Iterator[None]:
    """Inside, the backward pass reaches the outputs of embeddings, although nothing below is trained."""
    with ExitStack() as stack:
        for embedding in {id(m): m for m in model.modules() if isinstance(m, nn.Embedding)}.values():
            stack.callback(embedding.register_forward_hook(lambda _m, _a, y: y.requires_grad_()).remove)
        yield


@contextmanager
def _checkpointing(model: Any, **options: bool) -> Iterator[None]:
    model.gradient_checkpointing_enable(options or None)
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        # gradient_checkpointing_disable leaves this hook of gradient_checkpointing_enable.
        model.disable_input_require_grads()


def _evaluate(model: Any, setting: PassSetting) -> PassBytes:
    with counting(model, [], setting.on_gpu) as live, torch.no_grad():
        inputs = _inputs(setting)
        if setting.language:
            hidden_ND = model.base_model(**inputs)[0].flatten(0, 1)
            head = model.get_output_embeddings()
            head(hidden_ND[: _tokens_at_once(head, setting)]).float()
        else:
            model(**inputs)
    return PassBytes(0, live.peak)


def _tokens_at_once(head: nn.Module, setting: PassSetting) -> int:
    """Tokens whose logits are in memory at once on the estimated device."""
    return tokens_at_once(cast(Tensor, head._parameters["weight"]).shape[0], setting.memory)


@contextmanager
def counting(model: Any, before: list[Tensor], on_gpu: bool) -> Iterator[Live]:
    """Inside, bytes on the meta device are counted, and attention keeps no [T, T] matrix.

    Args:
        before: tensors outside the model that do not count.
        on_gpu: whether attention kernels support dropout.
    """
    live = Live([*model.parameters(), *model.buffers(), *before])
    attention = F.scaled_dot_product_attention
    cached, model.config.use_cache = getattr(model.config, "use_cache", False), False

    def replaced(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if options.get("dropout_p") and not on_gpu:
            # CPU kernels do not support dropout: they form [T, T] matrices.
            return attention(query, key, value, attn_mask, **options)
        return cast(Tensor, _Attention.apply(query, key, value, attn_mask))

    try:
        with mock.patch.object(F, "scaled_dot_product_attention", replaced), torch.enable_grad(), live:
            yield live
    finally:
        model.config.use_cache = cached


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: inputs, the mask in their dtype, output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(query.dtype)
        batch, heads, tokens, _ = query.shape
        # Kernels write their output as [B, T, H, D].
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(batch, heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _HeadLoss(torch.autograd.Function):
    """Losses [N] of tokens by a frozen head, in chunks; the forward pass makes the input gradients too."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head: nn.Module, size: int) -> Tensor:
        losses, gradients = [], []
        # Chunks from the third on keep as many bytes as the second, so one tensor replaces them.
        for start in range(0, min(2 * size, len(hidden_ND)), size):
            part = hidden_ND[start : start + size].detach().requires_grad_()
            targets = torch.empty(len(part), dtype=torch.int64, device="meta")
            with torch.enable_grad():
                loss = F.cross_entropy(head(part).float(), targets, reduction="none")
                (gradient,) = torch.autograd.grad(loss.sum(), part)
            losses.append(loss.detach())
            gradients.append(gradient)
        gradients.append(torch.empty_like(hidden_ND[2 * size :]))
        losses.append(loss.new_empty(len(gradients[-1])))
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * upstream_N.unsqueeze(1).to(gradient_ND.dtype), None, None


def _inputs(setting: PassSetting) -> dict[str, Tensor]:
    batch, tokens = setting.batch, setting.tokens
    inputs = {"input_ids": torch.empty(batch, tokens, dtype=torch.int64, device="meta")}
    if batch > 1:
        # Models make this mask from padding, which needs values.
        inputs["attention_mask"] = torch.empty(batch, 1, tokens, tokens, dtype=torch.bool, device="meta")
    return inputs


def _text_loss(model: Any, inputs: dict[str, Tensor], setting: PassSetting) -> Tensor:
    hidden_BTD = model.base_model(**inputs)[0]
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).clone()
    head = model.get_output_embeddings()
    losses_N = cast(Tensor, _HeadLoss.apply(hidden_ND, head, _tokens_at_once(head, setting)))
    return losses_N.view(setting.batch, -1).sum(1)


def _class_loss(logits_BC: Tensor) -> Tensor:
    return logits_BC.float().square().sum(1)


def _add_rows(rows: TableRows) -> None:
    """Allocate the row sums of an embedding's gradients, as if all tokens of the batch differed."""
    grad_BTD = rows.grad_BTD.float()
    rows_ND = torch.empty_like(grad_BTD).flatten(0, 1)
    rows_ND.index_add_(0, rows.ids_BT.reshape(-1), grad_BTD.flatten(0, 1))


def _know_norms(model: nn.Module) -> None:
    """Find each norm's rule by trying it on the CPU with values; norms are small."""
    for module in model.modules():
        held = list(module.parameters(recurse=False))
        if len(held) == 1 and held[0].dim() == 1 and next(module.children(), None) is None:
            alike = copy.deepcopy(module).to_empty(device="cpu")
            with torch.no_grad():
                next(alike.parameters()).fill_(1.0)
            affine.probe(module, alike)


@contextmanager
def sparse_entries(
    model: Any, scored: dict[str, nn.Parameter], ratio: float, scattered: bool
) -> Iterator[list[Entries]]:
    """Attach trainable entries to all scored parameters but embeddings, in proportion to their sizes.

    Args:
        ratio: trained entries over scored entries.
        scattered: whether they are in all rows and columns, or in the share of `columns_held`.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    required = {name for name, p in model.named_parameters() if p.requires_grad}
    held = columns_held(ratio, scattered)
    made = {id(p): _entries(name, p, ratio, held) for name, p in scored.items() if id(p) not in tables}
    attach_all(model, made)
    try:
        yield list(made.values())
    finally:
        detach_all(model, required)


def _entries(name: str, parameter: nn.Parameter, ratio: float, held: float) -> Entries:
    shape, numel = shape_of(parameter), numel_of(parameter)
    count = max(1, round(ratio * numel))
    made = make_entries(name, parameter, torch.empty(count, dtype=index_dtype(numel), device="meta"))
    if len(shape) == 2:
        rows, columns = (_side(size, held) for size in shape)
        made._product = Product("dense", (shape[0], shape[1]), rows, columns)
    made.patched = True
    return made


def _side(size: int, held: float) -> Side:
    """A share `held` of `size` rows or columns."""
    taken = max(1, round(held * size))
    return Side() if taken == size else Side(torch.empty(taken, dtype=torch.int32, device="meta"))
