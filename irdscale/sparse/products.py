"""Products that give k chosen entries of a matrix product, and the choice among them by what they cost.

Wanted are the entries at `index` of left^T right, [P, Q], summed over T tokens: a weight's gradient at its mask. Three
ways are equal but for rounding:

- `dense`: the product of the taken rows and columns (all of them, or those that hold an entry), then a gather. It
  multiplies much that is thrown away, at the speed of a matrix product.
- `sampled`: one dot product over the tokens for each entry (`torch.sparse.sampled_addmm`), which wants both sides
  transposed. It multiplies only what is kept, at a fraction of that speed.
- `tiles`: on a GPU, only those tiles of the product that hold an entry (`irdscale.sparse.kernels`); where the kernel
  cannot run, the dense way.

Everything is prepared from the indices and the shape. What is kept beside the indices has P + Q numbers, not k;
`tiles` alone keeps 4 bytes an entry.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from irdscale.sparse import kernels

Kind = Literal["dense", "sampled", "tiles"]


@dataclass(frozen=True)
class Rates:
    """What an operation costs, in multiplications-and-additions of a matrix product, for each token.

    The tokens themselves cancel out: every way's cost grows with them alike.

    Attributes:
        take: to take one row or column out (`index_select`; bound by memory).
        transpose: to transpose one row or column (bound by memory).
        dot: to multiply and add for one entry in a sampled product; None where there is none.
        tile: to multiply and add in a tile of the kernel's; None where there is none.
    """

    take: float
    transpose: float = 0.0
    dot: float | None = None
    tile: float | None = None


# 1 and 2 threads of AVX2 at T = 1024: 46-92 10^9 multiplications-and-additions a second in a product, 7-12 in a
# sampled one, 2.7 10^9 numbers taken, 4.6 10^9 transposed.
CPU = Rates(take=24, transpose=16, dot=7)
# From data sheets (300 10^12 multiplications-and-additions, 3 10^11 scattered numbers a second), not measured.
GPU = Rates(take=1000, tile=1.3)


def cost(
    kind: Kind,
    shape: tuple[int, int],
    active: tuple[int, int],
    taken: tuple[bool, bool],
    k: int,
    rates: Rates,
    tiles: int = 0,
) -> float:
    """Cost of a way for each token, in multiplications-and-additions of a matrix product.

    Args:
        shape: rows and columns.
        active: how many of them hold an entry.
        taken: whether those alone are taken, of rows and of columns.
        k: entries.
        tiles: tiles that hold an entry.
    """
    if kind == "tiles":
        assert rates.tile is not None
        return rates.tile * tiles * kernels.TILE**2
    sizes = [held if take else size for size, held, take in zip(shape, active, taken)]
    moved = rates.take * sum(size for size, take in zip(sizes, taken) if take)
    if kind == "dense":
        return moved + sizes[0] * sizes[1]
    assert rates.dot is not None
    return moved + rates.transpose * sum(sizes) + rates.dot * k


def choose(
    shape: tuple[int, int], active: tuple[int, int], k: int, rates: Rates, tiles: int = 0
) -> tuple[Kind, tuple[bool, bool]]:
    """The cheapest way, and whether it takes only the active rows and columns; the plainer one of equals."""
    kinds: tuple[Kind, ...] = ("dense",) if rates.dot is None else ("dense", "sampled")
    ways = [(kind, (rows, columns)) for kind in kinds for rows in (False, True) for columns in (False, True)]
    if rates.tile is not None:
        ways.append(("tiles", (False, False)))
    return min(ways, key=lambda way: cost(way[0], shape, active, way[1], k, rates, tiles))


@dataclass(frozen=True)
class Side:
    """The rows or the columns of one matrix.

    Attributes:
        taken: int32, sorted, those that are taken; None for all.
        place: int32, for each one its place among the taken.
    """

    taken: Tensor | None = None
    place: Tensor | None = None

    def take(self, x_TP: Tensor) -> Tensor:
        """The columns of x that are taken; x itself where it has no others."""
        if self.taken is None or x_TP.shape[1] == len(self.taken):
            return x_TP
        return x_TP.index_select(1, self.taken)

    def places(self, at_k: Tensor) -> Tensor:
        """Where the given ones lie among the taken."""
        return at_k if self.place is None else self.place.index_select(0, at_k)


@dataclass(frozen=True)
class Product:
    """How the entries of one matrix are computed.

    Attributes:
        kind: see the module.
        shape: rows and columns of the matrix.
        rows, columns: what is taken of it.
        starts: int32 or int64 [taken rows + 1], where each row's entries start (sampled).
        tiles: the tiles that hold entries (tiles).
    """

    kind: Kind
    shape: tuple[int, int]
    rows: Side
    columns: Side
    starts: Tensor | None = None
    tiles: kernels.Tiles | None = None

    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        kept = [self.rows.taken, self.rows.place, self.columns.taken, self.columns.place, self.starts]
        if self.tiles is not None:
            kept += [self.tiles.tiles, self.tiles.starts, self.tiles.order]
        return [tensor for tensor in kept if tensor is not None]

    def entries(self, left_TP: Tensor, right_TQ: Tensor, index: Tensor) -> Tensor:
        """The entries at `index`, the one that was prepared, of left^T right; [k].

        Either side may come whole or as what its `take` gave.
        """
        if self.tiles is not None and kernels.usable(left_TP, right_TQ):
            return kernels.tile_entries(left_TP, right_TQ, index, self.tiles)
        left_TR, right_TC = self.rows.take(left_TP), self.columns.take(right_TQ)
        row_k = torch.div(index, self.shape[1], rounding_mode="floor")
        column_k = self.columns.places(index - row_k * self.shape[1])
        if self.kind == "sampled":
            return self._sampled(left_TR, right_TC, column_k)
        # In the index's own type, for a place may pass 2^31 where an index does.
        place_k = self.rows.places(row_k).to(index.dtype) * right_TC.shape[1] + column_k
        return torch.mm(left_TR.t(), right_TC).view(-1).index_select(0, place_k)

    def _sampled(self, left_TR: Tensor, right_TC: Tensor, column_k: Tensor) -> Tensor:
        if left_TR.dtype not in (torch.float32, torch.float64):
            left_TR, right_TC = left_TR.float(), right_TC.float()
        assert self.starts is not None
        sums = _pattern(self.starts, column_k, left_TR.new_zeros(len(column_k)), (left_TR.shape[1], right_TC.shape[1]))
        if len(left_TR) == 0:
            return sums.values()
        length = _part(len(left_TR))
        for left_tR, right_tC in zip(left_TR.split(length), right_TC.split(length)):
            torch.sparse.sampled_addmm(sums, transposed(left_tR), transposed(right_tC).t(), out=sums)
        return sums.values()


def _part(tokens: int) -> int:
    """How many tokens to transpose at once: such that they stay in the cache, and rows do not share lines of it."""
    length = -(-tokens // (tokens // 512 + 1))
    return length + 8 if length % 32 == 0 else length


def transposed(x_TP: Tensor) -> Tensor:
    """x^T, contiguous. `channel_shuffle` transposes with vector instructions, at 3 to 5 times the speed of a copy."""
    tokens, width = x_TP.shape
    x_TP = x_TP.contiguous()
    size = tokens * width
    # One pixel of `size` channels in `tokens` groups, by strides that say that channels come last.
    shuffled = torch.channel_shuffle(x_TP.as_strided((1, size, 1, 1), (size, 1, size, size)), tokens)
    return shuffled.view(width, tokens)


def _pattern(starts: Tensor, column_k: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, column_k.to(starts.dtype), values, shape, check_invariants=False)


def prepare(index: Tensor, shape: tuple[int, ...], kind: Kind | None = None) -> Product:
    """Choose the product for a matrix by what it costs, and make what it needs beside `index`, on its device.

    Args:
        index: int32 or int64 [k], sorted flat indices.
        shape: rows and columns of the whole matrix.
        kind: this one instead of the cheapest.
    """
    height, width = shape
    row_k = torch.div(index, width, rounding_mode="floor")
    rows, counts = row_k.unique(return_counts=True)
    columns = (index - row_k * width).unique()
    rates = CPU if index.device.type == "cpu" else GPU
    active, tiles = (len(rows), len(columns)), 0
    if rates.tile is not None:
        tiles = kernels.count_tiles(row_k, index - row_k * width, width)
    best, taken = choose((height, width), active, len(index), rates, tiles)
    if kind is not None and kind != best:
        best, taken = kind, (False, False)
    starts = None
    if best == "sampled":
        if not taken[0]:
            counts = torch.bincount(row_k, minlength=height)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(index.dtype)
        with warnings.catch_warnings():
            # PyTorch says once a process that these tensors are in beta.
            warnings.simplefilter("ignore")
            _pattern(starts[:1], index[:0], torch.empty(0), (0, 0))
    if best == "tiles":
        return Product(
            best, (height, width), Side(), Side(), None, kernels.make_tiles(row_k, index - row_k * width, width)
        )
    return Product(best, (height, width), _side(rows, height, taken[0]), _side(columns, width, taken[1]), starts)


def _side(active: Tensor, size: int, take: bool) -> Side:
    if not take:
        return Side()
    place = torch.zeros(size, dtype=torch.int32, device=active.device)
    place[active.long()] = torch.arange(len(active), dtype=torch.int32, device=active.device)
    return Side(active.to(torch.int32), place)
