"""Per-sample gradients from what a module saw (X) and what came back (dY), by module type.

Each rule turns one call of a module into terms, one for each of its own scored parameters. The per-sample gradient of
a parameter is the sum of its terms over all calls of all modules that hold it (tied weights, layers run twice), and
is squared only then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from irdscale.distributed.zero3 import gathered_parameters
from irdscale.fisher.affine import is_affine, slope, without_hooks
from irdscale.models.quantized import dequantizes


@dataclass
class Outer:
    """G_n = sum over tokens of left_t right_t^T, for a parameter of shape [P, Q]."""

    left_BTP: Tensor
    right_BTQ: Tensor


@dataclass
class TableRows:
    """G_n has row `ids_t` increased by `grad_t`, for a parameter of shape [V, D]."""

    ids_BT: Tensor
    grad_BTD: Tensor


@dataclass
class Dense:
    """G_n itself, shape [B, *parameter]."""

    grad_B: Tensor


Term = Outer | TableRows | Dense


@dataclass
class ModuleCall:
    """One call of a module: its inputs, and how many samples the batch has."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int

    @property
    def x(self) -> Tensor:
        """The first tensor among the inputs."""
        return next(value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))


# Entries of several samples' gradients that are formed in one call: as many as a cache holds; on a GPU calls cost more.
TOGETHER = 600_000
GPU_TOGETHER = 2**24
# Tokens in a row of blocks of a Gram matrix, of which one triangle is formed. A GPU gains more by fewer calls.
BLOCK = 64
GPU_BLOCK = 512
# Numbers whose squares are summed faster alone than in a batch of such rows.
LONG = 2**15
# Two samples' gradients of so many entries are a small part of what a pass holds.
PAIRED = 2**24

Rule = Callable[[ModuleCall, Tensor, set[str]], dict[str, Term]]


def _samples(x: Tensor, batch: int) -> Tensor:
    """[B, ..., D], [1, ..., D] or [B T, D] (the samples' tokens one after the other) as [B, T, D]."""
    x = x.expand(batch, *x.shape[1:]) if batch > 1 and x.shape[0] == 1 else x
    return x.reshape(batch, -1, x.shape[-1])


def _linear(call: ModuleCall, dy: Tensor, wanted: set[str]) -> dict[str, Term]:
    dy_BTO = _samples(dy, call.batch)
    terms: dict[str, Term] = {}
    if "weight" in wanted:
        terms["weight"] = Outer(dy_BTO, _samples(call.x, call.batch))
    if "bias" in wanted:
        terms["bias"] = Dense(dy_BTO.sum(1))
    return terms


def _conv1d(call: ModuleCall, dy: Tensor, wanted: set[str]) -> dict[str, Term]:
    dy_BTO = _samples(dy, call.batch)
    terms: dict[str, Term] = {}
    if "weight" in wanted:
        terms["weight"] = Outer(_samples(call.x, call.batch), dy_BTO)
    if "bias" in wanted:
        terms["bias"] = Dense(dy_BTO.sum(1))
    return terms


def _embedding(call: ModuleCall, dy: Tensor, wanted: set[str]) -> dict[str, Term]:
    ids = call.x
    ids = ids.expand(call.batch, *ids.shape[1:]) if call.batch > 1 and ids.shape[0] == 1 else ids
    ids_BT, grad_BTD = ids.reshape(call.batch, -1), _samples(dy, call.batch)
    padding = cast(nn.Embedding, call.module).padding_idx
    if padding is not None:
        # Embedding gives its padding row no gradient.
        grad_BTD = grad_BTD.masked_fill(ids_BT.eq(padding).unsqueeze(2), 0)
    return {"weight": TableRows(ids_BT, grad_BTD)}


def _layer_norm(call: ModuleCall, dy: Tensor, wanted: set[str]) -> dict[str, Term]:
    module = cast(nn.LayerNorm, call.module)
    shape = tuple(module.normalized_shape)
    normal = F.layer_norm(call.x, shape, None, None, module.eps)
    terms: dict[str, Term] = {}
    if "weight" in wanted:
        terms["weight"] = Dense((dy * normal).reshape(call.batch, -1, *shape).sum(1))
    if "bias" in wanted:
        terms["bias"] = Dense(dy.reshape(call.batch, -1, *shape).sum(1))
    return terms


def _affine(call: ModuleCall, dy: Tensor, wanted: set[str]) -> dict[str, Term]:
    if len(call.args) + len(call.kwargs) != 1:
        return _generic(call, dy, wanted)
    (name,) = wanted
    return {name: Dense(_samples(dy * slope(call.module, call.x), call.batch).sum(1))}


def _generic(call: ModuleCall, dy: Tensor, wanted: set[str]) -> dict[str, Term]:
    """Vector-Jacobian product of the module alone, vmapped over samples."""
    module, batch = without_hooks(call.module), call.batch
    names = sorted(wanted)
    values = [*call.args, *call.kwargs.values()]
    keys = list(call.kwargs)
    mapped = [isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] in (batch, 1) for v in values]
    tensors = [
        v.detach().expand(batch, *v.shape[1:]) if is_mapped else v for v, is_mapped in zip(values, mapped, strict=True)
    ]

    def local(dy_sample: Tensor, *moving: Tensor) -> dict[str, Tensor]:
        stream = iter(moving)
        inputs = [next(stream).unsqueeze(0) if m else v for v, m in zip(tensors, mapped, strict=True)]
        args, kwargs = tuple(inputs[: len(call.args)]), dict(zip(keys, inputs[len(call.args) :], strict=True))
        _, pull = vjp(lambda p: functional_call(module, p, args, kwargs), parameters)[:2]
        return pull(dy_sample.unsqueeze(0))[0]

    moving = [v for v, m in zip(tensors, mapped, strict=True) if m]
    held = {name: p for name, p in call.module._parameters.items() if p is not None}
    with gathered_parameters(list(held.values())):
        parameters = {name: held[name].detach() for name in names}
        grads = vmap(local)(dy, *moving)
    return {name: Dense(grads[name]) for name in names}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module by the forward that it runs; None if no rule applies.

    A subclass that changes `forward` is not the type it derives from, and falls to the generic rule.
    """
    from transformers.pytorch_utils import Conv1D

    forward = type(module).forward
    if forward is nn.Linear.forward or dequantizes(type(module)):
        return _linear
    if forward is Conv1D.forward:
        return _conv1d
    if forward is nn.Embedding.forward:
        return _embedding if module.max_norm is None and not module.scale_grad_by_freq else None
    if forward is nn.LayerNorm.forward:
        return _layer_norm
    if is_affine(module):
        return _affine
    if next(module.children(), None) is None:
        return _generic
    return None


def is_generic(rule: Rule) -> bool:
    """Whether a rule runs the module's own forward again."""
    return rule in (_affine, _generic)


def _inner(a: Term, b: Term) -> Tensor:
    """Sum over the parameter's entries of the product of two terms' gradients, shape [B], without forming either."""
    if isinstance(a, Outer) and isinstance(b, Outer):
        left_BTT = torch.bmm(a.left_BTP, b.left_BTP.transpose(1, 2))
        right_BTT = torch.bmm(a.right_BTQ, b.right_BTQ.transpose(1, 2))
        return (left_BTT * right_BTT).sum((1, 2))
    if isinstance(a, TableRows) and isinstance(b, TableRows):
        same_BTT = a.ids_BT.unsqueeze(2) == b.ids_BT.unsqueeze(1)
        return (torch.bmm(a.grad_BTD, b.grad_BTD.transpose(1, 2)) * same_BTT).sum((1, 2))
    if isinstance(a, Outer) and isinstance(b, TableRows):
        product_BTT = torch.bmm(a.right_BTQ, b.grad_BTD.transpose(1, 2))
        left_BTT = a.left_BTP.gather(2, b.ids_BT.unsqueeze(1).expand(-1, a.left_BTP.shape[1], -1))
        return (left_BTT * product_BTT).sum((1, 2))
    if isinstance(a, TableRows) and isinstance(b, Outer):
        return _inner(b, a)
    raise TypeError("no inner product of dense terms")


def _norms(outer: Outer, buffers: Buffers) -> Tensor:
    """`_inner` of a term with itself: both Gram matrices of tokens are symmetric."""
    total_B = outer.left_BTP.new_zeros(len(outer.left_BTP))
    # What a module saw is the right side of most, and the same for those that stand side by side.
    for left_BbT, right_BbT in zip(_gram(outer.left_BTP), buffers.gram(outer.right_BTQ), strict=True):
        product_BbT = left_BbT * right_BbT
        before = product_BbT.shape[2] - product_BbT.shape[1]
        if before:
            product_BbT[:, :, :before] *= 2
        total_B += product_BbT.sum((1, 2))
    return total_B


def _gram(x_BTK: Tensor) -> list[Tensor]:
    """The inner products of each sample's tokens, by rows of blocks, each up to its block on the diagonal."""
    x_BKT, block = x_BTK.transpose(1, 2), GPU_BLOCK if x_BTK.is_cuda else BLOCK
    starts = range(0, x_BTK.shape[1], block)
    return [torch.bmm(x_BTK[:, i : i + block], x_BKT[:, :, : i + block]) for i in starts]


def _cast(term: Term) -> Term:
    """Squares are formed in float32 at least."""

    def up(x: Tensor) -> Tensor:
        return x if x.dtype in (torch.float32, torch.float64) else x.float()

    if isinstance(term, Outer):
        left, right = up(term.left_BTP), up(term.right_BTQ)
        wide = torch.promote_types(left.dtype, right.dtype)
        return Outer(left.to(wide), right.to(wide))
    if isinstance(term, TableRows):
        return TableRows(term.ids_BT, up(term.grad_BTD))
    return Dense(up(term.grad_B))


def concatenated(terms: list[Term]) -> list[Term]:
    """The terms cast, and the outer ones of several calls joined along their tokens: (A + B) is then one product."""
    terms = [_cast(t) for t in terms]
    outers = [t for t in terms if isinstance(t, Outer)]
    others = [t for t in terms if not isinstance(t, Outer)]
    if len(outers) > 1:
        lefts, rights = [t.left_BTP for t in outers], [t.right_BTQ for t in outers]
        return [Outer(torch.cat(lefts, 1), torch.cat(rights, 1)), *others]
    return [*outers, *others]


def per_sample_gradient(terms: list[Term], n: int, shape: torch.Size) -> Tensor:
    """G_n of one sample, in the parameter's shape, from the sum of its terms (as `concatenated` leaves them)."""
    gradient: Tensor | None = None
    for term in terms:
        if isinstance(term, Outer):
            gradient = torch.mm(term.left_BTP[n].t(), term.right_BTQ[n]).view(shape)
        elif isinstance(term, TableRows):
            if gradient is None:
                gradient = term.grad_BTD.new_zeros(shape)
            gradient.index_add_(0, term.ids_BT[n], term.grad_BTD[n].to(gradient.dtype))
        else:
            gradient = term.grad_B[n].reshape(shape) if gradient is None else gradient + term.grad_B[n].reshape(shape)
    assert gradient is not None
    return gradient


class Buffers:
    """One scratch buffer a data type, as large as the largest gradient asked for, and the last Gram matrix."""

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        # It holds on to the tensor too, so that no other can come to lie in its place.
        self._gram: tuple[Tensor, int, list[Tensor]] | None = None

    def take(self, shape: torch.Size, like: Tensor) -> Tensor:
        """A contiguous scratch tensor of `shape`; what it held before is lost."""
        key, numel = (like.dtype, like.device), shape.numel()
        if key not in self._flat or self._flat[key].numel() < numel:
            self._flat[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return self._flat[key][:numel].view(shape)

    def gram(self, x_BTK: Tensor) -> list[Tensor]:
        """What `_gram` gives, without forming it again for the same tensor twice in a row."""
        if self._gram is not None:
            last, version, blocks = self._gram
            same_place = last.data_ptr() == x_BTK.data_ptr() and last.stride() == x_BTK.stride()
            if same_place and last.shape == x_BTK.shape and last.dtype == x_BTK.dtype and last._version == version:
                return blocks
        self._gram = x_BTK, x_BTK._version, _gram(x_BTK)
        return self._gram[2]

    def forget(self) -> None:
        """Let go of what belongs to one batch."""
        self._gram = None


def _by_kernel(terms: list[Term], total: Tensor, trace_B: Tensor | None) -> bool:
    """Add the squares of one outer product on a GPU, uncast, where the kernel can; whether it did."""
    first = terms[0]
    if len(terms) > 1 or not isinstance(first, Outer) or not first.left_BTP.is_cuda or first.left_BTP.shape[1] == 1:
        return False
    from irdscale.fisher import kernels

    usable = kernels.usable(first.left_BTP, first.right_BTQ, total)
    if usable:
        kernels.add_squared_products(first.left_BTP, first.right_BTQ, total, trace_B)
    return usable


def add_squares(terms: list[Term], total: Tensor, trace_B: Tensor | None, buffers: Buffers) -> None:
    """total += sum_n G_n^2, and trace_B[n] += sum of G_n^2 where it is wanted (float64).

    Args:
        terms: the terms of one parameter over all its uses in a batch.
        total: the parameter's running sum, in the parameter's shape.
    """
    if _by_kernel(terms, total, trace_B):
        return
    terms = concatenated(terms)
    first = terms[0]
    if len(terms) == 1 and isinstance(first, TableRows):
        _add_row_squares(first, total, trace_B)
    elif all(isinstance(t, Dense) for t in terms):
        gradient_B = _dense_sum(terms).reshape(-1, *total.shape)
        if trace_B is None:
            total += torch.linalg.vecdot(gradient_B, gradient_B, dim=0)
            return
        square_B = gradient_B.square()
        total += square_B.sum(0, dtype=total.dtype)
        trace_B += square_B.flatten(1).sum(1, dtype=torch.float64)
    elif len(terms) == 1 and isinstance(first, Outer):
        _add_outer_squares(first, total, trace_B, buffers)
    else:
        for n in range(_batch(first)):
            _add_square(per_sample_gradient(terms, n, total.shape), total, None if trace_B is None else trace_B[n])


def _add_outer_squares(outer: Outer, total: Tensor, trace_B: Tensor | None, buffers: Buffers) -> None:
    left_BTP, right_BTQ = outer.left_BTP, outer.right_BTQ
    batch, tokens, _ = left_BTP.shape
    if tokens == 1:
        # With one token the square of the product is the product of the squares.
        left_BP, right_BQ = left_BTP[:, 0].square(), right_BTQ[:, 0].square()
        total.add_(left_BP.t() @ right_BQ)
        if trace_B is not None:
            trace_B += left_BP.sum(1, dtype=torch.float64) * right_BQ.sum(1, dtype=torch.float64)
        return
    together = min(batch, _together(left_BTP, total.shape))
    gradient_bPQ = buffers.take(torch.Size((together, *total.shape)), left_BTP)
    gradients = gradient_bPQ.unbind()
    left_BPT = left_BTP.transpose(1, 2)
    if together == 1:
        for n, (left_PT, right_TQ) in enumerate(zip(left_BPT.unbind(), right_BTQ.unbind(), strict=True)):
            torch.mm(left_PT, right_TQ, out=gradients[0])
            _add_square(gradients[0], total, None if trace_B is None else trace_B[n])
        return
    first = 0
    for left_bPT, right_bTQ in zip(left_BPT.split(together), right_BTQ.split(together), strict=True):
        torch.bmm(left_bPT, right_bTQ, out=gradient_bPQ[: len(left_bPT)])
        for n, gradient in enumerate(gradients[: len(left_bPT)], first):
            _add_square(gradient, total, None if trace_B is None else trace_B[n])
        first += together


def _together(left: Tensor, shape: torch.Size) -> int:
    """Samples whose products are formed in one call; on CPU threads, two that are wide."""
    if left.is_cuda:
        return max(1, GPU_TOGETHER // max(1, shape.numel()))
    if left.device.type == "cpu" and shape[0] < shape[1] and shape.numel() <= PAIRED and torch.get_num_threads() > 1:
        return max(2, TOGETHER // shape.numel())
    return max(1, TOGETHER // max(1, shape.numel()))


def _add_square(gradient: Tensor, total: Tensor, trace: Tensor | None) -> None:
    if gradient.dtype == total.dtype:
        total.addcmul_(gradient, gradient)
    else:
        total += gradient.to(total.dtype).square_()
    if trace is not None:
        flat = gradient.view(-1)
        trace += torch.dot(flat, flat)


def _dense_sum(terms: list[Term]) -> Tensor:
    first, *others = [t.grad_B for t in terms if isinstance(t, Dense)]
    for other in others:
        first = first + other
    return first


def add_gradients(terms: list[Term], total: Tensor, trace_B: Tensor | None, buffers: Buffers) -> None:
    """total += sum_n G_n, and trace_B[n] += sum of G_n^2 where it is wanted (float64)."""
    for term in terms:
        term = _cast(term)
        if isinstance(term, Outer):
            total += (term.left_BTP.flatten(0, 1).t() @ term.right_BTQ.flatten(0, 1)).to(total.dtype)
        elif isinstance(term, TableRows):
            total.index_add_(0, term.ids_BT.flatten(), term.grad_BTD.flatten(0, 1).to(total.dtype))
        else:
            total += term.grad_B.sum(0).reshape(total.shape).to(total.dtype)
    if trace_B is not None:
        add_traces(terms, total.shape, trace_B, buffers)


def add_traces(terms: list[Term], shape: torch.Size, trace_B: Tensor, buffers: Buffers) -> None:
    """trace_B[n] += sum of G_n^2 (float64), by inner products of tokens where that is less work than forming G_n."""
    terms = concatenated(terms)
    first = terms[0]
    if isinstance(first, Outer) and not any(isinstance(t, Dense) for t in terms):
        tokens, (rows, columns) = first.left_BTP.shape[1], (shape[0], shape[1])
        if tokens * (rows + columns) < rows * columns or len(terms) > 1:
            for i, a in enumerate(terms):
                trace_B += (_norms(a, buffers) if isinstance(a, Outer) else _inner(a, a)).double()
                for b in terms[i + 1 :]:
                    trace_B += 2 * _inner(a, b).double()
            return
        together = min(_batch(first), _together(first.left_BTP, shape))
        gradient_bPQ = buffers.take(torch.Size((together, *shape)), first.left_BTP)
        left_BPT, right_BTQ = first.left_BTP.transpose(1, 2), first.right_BTQ
        for start in range(0, _batch(first), together):
            left_bPT, right_bTQ = left_BPT[start : start + together], right_BTQ[start : start + together]
            flat_bK = torch.bmm(left_bPT, right_bTQ, out=gradient_bPQ[: len(left_bPT)]).flatten(1)
            trace_B[start : start + together] += _squared_norms(flat_bK)
    elif len(terms) == 1 and isinstance(first, TableRows):
        _add_row_squares(first, None, trace_B)
    elif all(isinstance(t, Dense) for t in terms):
        trace_B += _dense_sum(terms).flatten(1).square().sum(1, dtype=torch.float64)
    else:
        for n in range(_batch(first)):
            flat = per_sample_gradient(terms, n, shape).reshape(-1)
            trace_B[n] += torch.dot(flat, flat)


def _squared_norms(flat_BK: Tensor) -> Tensor:
    """The sum of squares of each row; on a processor, long rows take less one by one."""
    if flat_BK.is_cuda or flat_BK.shape[1] < LONG:
        return torch.linalg.vecdot(flat_BK, flat_BK)
    return torch.stack([torch.dot(flat_K, flat_K) for flat_K in flat_BK])


def _batch(term: Term) -> int:
    if isinstance(term, Outer):
        return term.left_BTP.shape[0]
    return term.ids_BT.shape[0] if isinstance(term, TableRows) else term.grad_B.shape[0]


def _add_row_squares(rows: TableRows, total: Tensor | None, trace_B: Tensor | None) -> None:
    """Sum the gradients of equal ids within a sample before squaring; only rows that occur are touched.

    Nothing here waits for the device: equal ids are found by sorting, with room for as many as there are tokens.
    """
    batch, tokens, width = rows.grad_BTD.shape
    ids_BT, order_BT = rows.ids_BT.sort(1)
    first_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    first_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    # The place of each token's run among the runs of its sample, and so of the batch.
    start_B1 = tokens * torch.arange(batch, device=ids_BT.device).unsqueeze(1)
    run_N = (start_B1 + first_BT.cumsum(1) - 1).flatten()
    grad_ND = rows.grad_BTD.reshape(-1, width).index_select(0, (start_B1 + order_BT).flatten())
    squares_ND = grad_ND.new_zeros(batch * tokens, width).index_add_(0, run_N, grad_ND).square_()
    if total is not None:
        # A run without tokens adds zeros, to row 0.
        ids_N = torch.zeros_like(run_N).index_copy_(0, run_N, ids_BT.flatten().long())
        total.index_add_(0, ids_N, squares_ND.to(total.dtype))
    if trace_B is not None:
        trace_B += squares_ND.view(batch, -1).sum(1, dtype=torch.float64)
