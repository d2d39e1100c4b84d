"""Entries of quantised weights, which are patched into the dequantised matrix at each use, never into the codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from irdscale.sparse.entries import Entries, write_entries
from irdscale.sparse.functions import unlowered
from irdscale.utils.quantized import dequantized


def effective_matrix(weight: nn.Parameter, entries: Entries | None) -> Tensor:
    """A quantised weight's dequantised matrix [O, I] with base + delta at the entries, as a new tensor."""
    matrix = dequantized(weight)
    if entries is not None:
        entries.follow()
        with unlowered(matrix.device.type):
            weights = entries.effective().to(matrix.dtype)
        write_entries(matrix.view(-1), entries.index.long(), weights)
    return matrix


def at_each_use(weight: nn.Parameter, entries: Entries | None) -> Callable[[], Tensor]:
    """A function that makes `effective_matrix`; `SparseMatmul` calls it in the forward and in the backward pass."""
    return partial(effective_matrix, weight, entries)
