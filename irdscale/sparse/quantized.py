"""Entries of quantised weights: put into the dequantised matrix at each use, for nothing is written into the codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from irdscale.sparse.functions import unlowered, write_numbers
from irdscale.utils.quantized import dequantized

if TYPE_CHECKING:
    from irdscale.sparse.modules import Entries


def effective_matrix(weight: nn.Parameter, entries: Entries | None) -> Tensor:
    """The matrix that a quantised weight stands for, with base + delta at the entries, as a new tensor."""
    matrix = dequantized(weight)
    if entries is not None:
        entries.follow()
        with unlowered(matrix.device.type):
            numbers = entries.effective().to(matrix.dtype)
        write_numbers(matrix.view(-1), entries.index.long(), numbers)
    return matrix


def at_each_use(weight: nn.Parameter, entries: Entries | None) -> Callable[[], Tensor]:
    """What `SparseMatmul` calls for the matrix of a quantised weight, in the forward and in the backward pass."""
    return partial(effective_matrix, weight, entries)
