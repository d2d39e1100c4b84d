"""Sums of squared per-sample gradients and Fisher traces of samples, from the terms of one parameter."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from irdscale.fisher.terms import Dense, Outer, TableRows, Term, concatenated, per_sample_gradient, samples_in, widened

# Gradient entries formed in one call: as many as a CPU's cache holds. On a GPU each call costs more.
ENTRIES_A_CALL = 600_000
GPU_ENTRIES_A_CALL = 2**24
# Tokens in a block of rows of a Gram matrix, of which only one triangle is formed. Fewer calls are faster on a GPU.
BLOCK = 64
GPU_BLOCK = 512
# Entries from which a CPU sums the squares of one row faster than those of a batch of rows.
LONG_ROW = 2**15
# Gradients of at most this size are formed in pairs on CPU threads: they take little of a pass's memory.
PAIR_ENTRIES = 2**24


class Buffers:
    """One scratch buffer per data type and device, of the largest size requested, and the last Gram matrix."""

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        # The tensor is kept too, so that its address is not reused by another.
        self._gram: tuple[Tensor, int, list[Tensor]] | None = None

    def take(self, shape: torch.Size, like: Tensor) -> Tensor:
        """A contiguous scratch tensor of `shape`, with the data type and device of `like`; it overwrites the last."""
        key, numel = (like.dtype, like.device), shape.numel()
        if key not in self._flat or self._flat[key].numel() < numel:
            self._flat[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return self._flat[key][:numel].view(shape)

    def gram(self, x_BTK: Tensor) -> list[Tensor]:
        """`_gram` of a tensor, formed once for the same tensor in consecutive calls."""
        if self._gram is not None:
            last, version, blocks = self._gram
            same_place = last.data_ptr() == x_BTK.data_ptr() and last.stride() == x_BTK.stride()
            if same_place and last.shape == x_BTK.shape and last.dtype == x_BTK.dtype and last._version == version:
                return blocks
        self._gram = x_BTK, x_BTK._version, _gram(x_BTK)
        return self._gram[2]

    def forget(self) -> None:
        """Release the Gram matrix of a batch."""
        self._gram = None


def _inner(a: Term, b: Term) -> Tensor:
    """The inner product of two terms' gradients, shape [B], without forming either."""
    # `concatenated` leaves at most one outer product, which comes first.
    assert isinstance(b, TableRows)
    assert not isinstance(a, Dense)
    if isinstance(a, TableRows):
        same_BTT = a.ids_BT.unsqueeze(2) == b.ids_BT.unsqueeze(1)
        return (torch.bmm(a.grad_BTD, b.grad_BTD.transpose(1, 2)) * same_BTT).sum((1, 2))
    product_BTT = torch.bmm(a.right_BTQ, b.grad_BTD.transpose(1, 2))
    left_BTT = a.left_BTP.gather(2, b.ids_BT.unsqueeze(1).expand(-1, a.left_BTP.shape[1], -1))
    return (left_BTT * product_BTT).sum((1, 2))


def _norms(outer: Outer, buffers: Buffers) -> Tensor:
    """`_inner` of a term with itself, where both Gram matrices are symmetric."""
    total_B = outer.left_BTP.new_zeros(len(outer.left_BTP))
    # The input of a module is usually the right factor, and neighbouring modules share it.
    for left_BbT, right_BbT in zip(_gram(outer.left_BTP), buffers.gram(outer.right_BTQ), strict=True):
        product_BbT = left_BbT * right_BbT
        before = product_BbT.shape[2] - product_BbT.shape[1]
        if before:
            product_BbT[:, :, :before] *= 2
        total_B += product_BbT.sum((1, 2))
    return total_B


def _gram(x_BTK: Tensor) -> list[Tensor]:
    """The lower triangle of each sample's Gram matrix of tokens, in rows of blocks up to the diagonal."""
    x_BKT, block = x_BTK.transpose(1, 2), GPU_BLOCK if x_BTK.is_cuda else BLOCK
    starts = range(0, x_BTK.shape[1], block)
    return [torch.bmm(x_BTK[:, i : i + block], x_BKT[:, :, : i + block]) for i in starts]


def _by_kernel(terms: list[Term], total: Tensor, trace_B: Tensor | None) -> bool:
    """Add the squares of one outer product by the GPU kernel, without a cast; returns whether the kernel was used."""
    first = terms[0]
    if len(terms) > 1 or not isinstance(first, Outer) or not first.left_BTP.is_cuda or first.left_BTP.shape[1] == 1:
        return False
    from irdscale.fisher import kernels

    usable = kernels.usable(first.left_BTP, first.right_BTQ, total)
    if usable:
        kernels.add_squared_products(first.left_BTP, first.right_BTQ, total, trace_B)
    return usable


def add_squares(terms: list[Term], total: Tensor, trace_B: Tensor | None, buffers: Buffers) -> None:
    """total += sum_n G_n^2, and trace_B[n] += sum of G_n^2 unless it is None.

    Args:
        terms: terms of one parameter over all its uses in a batch
        total: running sum, in the parameter's shape
        trace_B: float64 [B]
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
        for n in range(samples_in(first)):
            _add_square(per_sample_gradient(terms, n, total.shape), total, None if trace_B is None else trace_B[n])


def _add_outer_squares(outer: Outer, total: Tensor, trace_B: Tensor | None, buffers: Buffers) -> None:
    left_BTP, right_BTQ = outer.left_BTP, outer.right_BTQ
    batch, tokens, _ = left_BTP.shape
    if tokens == 1:
        # With one token, the square of the product is the product of the squares.
        left_BP, right_BQ = left_BTP[:, 0].square(), right_BTQ[:, 0].square()
        total.add_(left_BP.t() @ right_BQ)
        if trace_B is not None:
            trace_B += left_BP.sum(1, dtype=torch.float64) * right_BQ.sum(1, dtype=torch.float64)
        return
    together = min(batch, _samples_a_call(left_BTP, total.shape))
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


def _samples_a_call(left: Tensor, shape: torch.Size) -> int:
    """Number of samples whose gradients are formed in one call; at least two wide ones on CPU threads."""
    if left.is_cuda:
        return max(1, GPU_ENTRIES_A_CALL // max(1, shape.numel()))
    if (
        left.device.type == "cpu"
        and shape[0] < shape[1]
        and shape.numel() <= PAIR_ENTRIES
        and torch.get_num_threads() > 1
    ):
        return max(2, ENTRIES_A_CALL // shape.numel())
    return max(1, ENTRIES_A_CALL // max(1, shape.numel()))


def _add_square(gradient: Tensor, total: Tensor, trace: Tensor | None) -> None:
    if gradient.dtype == total.dtype:
        total.addcmul_(gradient, gradient)
    else:
        total += gradient.to(total.dtype).square_()
    if trace is not None:
        flat = gradient.view(-1)
        trace += torch.dot(flat, flat)


def _dense_sum(terms: list[Term]) -> Tensor:
    return reduce(torch.add, [t.grad_B for t in terms if isinstance(t, Dense)])


def add_gradients(terms: list[Term], total: Tensor, trace_B: Tensor | None, buffers: Buffers) -> None:
    """total += sum_n G_n, and trace_B[n] += sum of G_n^2 unless it is None (float64)."""
    for term in terms:
        term = widened(term)
        if isinstance(term, Outer):
            total += (term.left_BTP.flatten(0, 1).t() @ term.right_BTQ.flatten(0, 1)).to(total.dtype)
        elif isinstance(term, TableRows):
            total.index_add_(0, term.ids_BT.flatten(), term.grad_BTD.flatten(0, 1).to(total.dtype))
        else:
            total += term.grad_B.sum(0).reshape(total.shape).to(total.dtype)
    if trace_B is not None:
        add_traces(terms, total.shape, trace_B, buffers)


def add_traces(terms: list[Term], shape: torch.Size, trace_B: Tensor, buffers: Buffers) -> None:
    """trace_B[n] += sum of G_n^2 (float64), by inner products of tokens where that takes less work than forming G_n."""
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
        together = min(samples_in(first), _samples_a_call(first.left_BTP, shape))
        gradient_bPQ = buffers.take(torch.Size((together, *shape)), first.left_BTP)
        left_BPT, right_BTQ = first.left_BTP.transpose(1, 2), first.right_BTQ
        for start in range(0, samples_in(first), together):
            left_bPT, right_bTQ = left_BPT[start : start + together], right_BTQ[start : start + together]
            flat_bK = torch.bmm(left_bPT, right_bTQ, out=gradient_bPQ[: len(left_bPT)]).flatten(1)
            trace_B[start : start + together] += _squared_norms(flat_bK)
    elif len(terms) == 1 and isinstance(first, TableRows):
        _add_row_squares(first, None, trace_B)
    elif all(isinstance(t, Dense) for t in terms):
        trace_B += _dense_sum(terms).flatten(1).square().sum(1, dtype=torch.float64)
    else:
        for n in range(samples_in(first)):
            flat = per_sample_gradient(terms, n, shape).reshape(-1)
            trace_B[n] += torch.dot(flat, flat)


def _squared_norms(flat_BK: Tensor) -> Tensor:
    """The sum of squares of each row; long rows are faster one by one on a CPU."""
    if flat_BK.is_cuda or flat_BK.shape[1] < LONG_ROW:
        return torch.linalg.vecdot(flat_BK, flat_BK)
    return torch.stack([torch.dot(flat_K, flat_K) for flat_K in flat_BK])


def _add_row_squares(rows: TableRows, total: Tensor | None, trace_B: Tensor | None) -> None:
    """Sum the gradients of equal ids within a sample before squaring; only rows that occur are touched.

    Equal ids are found by sorting, with space for one run per token, so the host does not wait for the device.
    """
    batch, tokens, width = rows.grad_BTD.shape
    ids_BT, order_BT = rows.ids_BT.sort(1)
    first_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    first_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    # Index of each token's run of equal ids among all runs of the batch.
    start_B1 = tokens * torch.arange(batch, device=ids_BT.device).unsqueeze(1)
    run_N = (start_B1 + first_BT.cumsum(1) - 1).flatten()
    grad_ND = rows.grad_BTD.reshape(-1, width).index_select(0, (start_B1 + order_BT).flatten())
    squares_ND = grad_ND.new_zeros(batch * tokens, width).index_add_(0, run_N, grad_ND).square_()
    if total is not None:
        # Unused runs add zeros to row 0.
        ids_N = torch.zeros_like(run_N).index_copy_(0, run_N, ids_BT.flatten().long())
        total.index_add_(0, ids_N, squares_ND.to(total.dtype))
    if trace_B is not None:
        trace_B += squares_ND.view(batch, -1).sum(1, dtype=torch.float64)
