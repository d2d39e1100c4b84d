"""Per-sample gradients as terms: factors of a sample's gradient G_n, which is formed only where a sum needs it.

The gradient of a parameter is the sum of its terms over all calls of all modules that hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Outer:
    """G_n = sum over tokens t of left_t right_t^T, for a parameter of shape [P, Q]."""

    left_BTP: Tensor
    right_BTQ: Tensor


@dataclass
class TableRows:
    """G_n = sum over tokens t of grad_t in row ids_t, for a parameter of shape [V, D]."""

    ids_BT: Tensor
    grad_BTD: Tensor


@dataclass
class Dense:
    """G_n itself, shape [B, *parameter]."""

    grad_B: Tensor


Term = Outer | TableRows | Dense


def samples_in(term: Term) -> int:
    """Number of samples B."""
    return len(
        term.left_BTP if isinstance(term, Outer) else term.grad_BTD if isinstance(term, TableRows) else term.grad_B
    )


def wide(x: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def widened(term: Term) -> Term:
    """The term in float32 at least; both factors of an outer product in one data type."""
    if isinstance(term, Outer):
        left, right = wide(term.left_BTP), wide(term.right_BTQ)
        dtype = torch.promote_types(left.dtype, right.dtype)
        return Outer(left.to(dtype), right.to(dtype))
    if isinstance(term, TableRows):
        return TableRows(term.ids_BT, wide(term.grad_BTD))
    return Dense(wide(term.grad_B))


def concatenated(terms: list[Term]) -> list[Term]:
    """The terms in float32 at least, all outer products concatenated along their tokens into one."""
    terms = [widened(t) for t in terms]
    outers = [t for t in terms if isinstance(t, Outer)]
    others = [t for t in terms if not isinstance(t, Outer)]
    if len(outers) > 1:
        lefts, rights = [t.left_BTP for t in outers], [t.right_BTQ for t in outers]
        return [Outer(torch.cat(lefts, 1), torch.cat(rights, 1)), *others]
    return [*outers, *others]


def per_sample_gradient(terms: list[Term], n: int, shape: torch.Size) -> Tensor:
    """G_n of one sample, in the parameter's shape, from its terms as `concatenated` returns them."""
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
