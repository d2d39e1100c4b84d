"""Four ways to compute k entries of a matrix product, and the choice of the cheapest.

The entries are those at `index` of left^T right, [P, Q], summed over T tokens: a weight's gradient at its mask. The
ways give equal results up to rounding:

- `dense`: the product of all rows and columns, or of those with an entry, then a gather. It computes many unused
  entries, at the speed of a matrix product.
- `sampled`: one dot product over the tokens for each entry (`torch.sparse.sampled_addmm`), with both sides transposed.
  It computes only the entries, at a fraction of that speed.
- `tiles`: on a GPU, the tiles of the product that hold an entry (`irdscale.sparse.kernels`), for clustered entries.
- `dots`: on a GPU, one dot product over the tokens for each entry (`irdscale.sparse.dots`), for scattered entries.

The dense way replaces a kernel that cannot run.

The index and the shape determine everything prepared. It is kept (one integer per entry, row and column), because
preparing it in each step costs about 1 % of a small model's step. `dots` keeps two integers per slot, about 1.25 slots
per entry.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from irdscale.sparse import dots, kernels

Kind = Literal["dense", "sampled", "tiles", "dots"]


@dataclass(frozen=True)
class DotRates:
    """Costs of the `dots` way, in the unit of `Rates`.

    Attributes:
        entry: multiplying, adding and writing one entry.
        row: loading one row of the wider side, for each part of the narrower one.
        copy: copying one row or column of the narrower side.
        launch: launching the kernels.
    """

    entry: float
    row: float
    copy: float
    launch: float


@dataclass(frozen=True)
class Rates:
    """Costs of operations per token, in multiply-adds of a matrix product. All ways' costs are linear in the tokens.

    Attributes:
        take: selecting one row or column (`index_select`; bound by memory).
        transpose: transposing one row or column (bound by memory).
        read: reading one row or column from memory, in parallel with multiplications.
        sampled: one entry of a sampled product; None if that is unavailable.
        tile: one multiply-add of the tile kernel; None if that is unavailable.
        tiles: number of tiles that run at once.
        dots: costs of the kernel for scattered entries; None if that is unavailable.
    """

    take: float
    transpose: float = 0.0
    read: float = 0.0
    sampled: float | None = None
    tile: float | None = None
    tiles: int = 1
    dots: DotRates | None = None


# 1 and 2 threads of AVX2 at T = 1024: 46 to 92 x 10^9 multiply-adds a second in a matrix product, 7 to 12 x 10^9 in a
# sampled one; 2.7 x 10^9 values a second selected, 4.6 x 10^9 transposed.
CPU = Rates(take=24, transpose=16, sampled=7)

# An H100; `irdscale bench gpu` measures the ways.
# Multiply-adds a second of a matrix product: measured (0.214 ms for [8192, 2048] of 4096 tokens).
DENSE = 321e12
GPU = Rates(
    # 10^11 scattered values a second: estimated, not measured (a sector of 32 bytes each, at 3.3 TB/s).
    take=DENSE / 1e11,
    # 2 bytes at 3 TB/s: estimated, not measured.
    read=DENSE * 2 / 3e12,
    # 88 x 10^12 a second: estimated, not measured (a tile of 64 x 64 does 16 per byte from L2, at 5.5 TB/s).
    tile=DENSE / 88e12,
    # One per multiprocessor: the data sheet.
    tiles=132,
    dots=DotRates(
        # 0.14 ps: estimated, not measured (24 cycles of L1 for 16 slots of 64 tokens, about 12 of them used, on 132
        # multiprocessors at 1.755 GHz, and 8 bytes of sums at 4 TB/s).
        entry=DENSE * 0.14e-12,
        # 0.17 ps: estimated, not measured (512 cycles of L1 for 256 rows of 64 tokens).
        row=DENSE * 0.17e-12,
        # 4 bytes, read and written, at 4 TB/s, L2 and memory: estimated, not measured.
        copy=DENSE * 4 / 4e12,
        # 10 us, three kernels, at 4096 tokens: estimated, not measured.
        launch=DENSE * 10e-6 / 4096,
    ),
)


def cost(
    kind: Kind,
    shape: tuple[int, int],
    active: tuple[int, int],
    taken: tuple[bool, bool],
    k: int,
    rates: Rates,
    tiles: int = 0,
) -> float:
    """Cost of a way per token, in multiply-adds of a matrix product.

    Args:
        shape: rows and columns.
        active: rows and columns that hold an entry.
        taken: whether only active rows, and only active columns, are taken.
        k: number of entries.
        tiles: number of tiles that hold an entry.
    """
    if kind == "tiles":
        assert rates.tile is not None
        return rates.tile * max(tiles, rates.tiles) * kernels.TILE**2
    if kind == "dots":
        assert rates.dots is not None
        stream, slab = max(shape), min(shape)
        multiplied = rates.dots.entry * k + rates.dots.row * stream * dots.parts_of(slab)
        return max(multiplied, rates.read * sum(shape)) + rates.dots.copy * slab + rates.dots.launch
    sizes = [held if take else size for size, held, take in zip(shape, active, taken)]
    moved = rates.take * sum(size for size, take in zip(sizes, taken) if take)
    if kind == "dense":
        return moved + max(sizes[0] * sizes[1], rates.read * sum(sizes))
    assert rates.sampled is not None
    return moved + rates.transpose * sum(sizes) + rates.sampled * k


def choose(
    shape: tuple[int, int], active: tuple[int, int], k: int, rates: Rates, tiles: int = 0
) -> tuple[Kind, tuple[bool, bool]]:
    """The cheapest way, and whether it takes only the active rows and columns; the first of equals."""
    kinds: tuple[Kind, ...] = ("dense",) if rates.sampled is None else ("dense", "sampled")
    ways = [(kind, (rows, columns)) for kind in kinds for rows in (False, True) for columns in (False, True)]
    if rates.tile is not None:
        ways.append(("tiles", (False, False)))
    if rates.dots is not None:
        ways.append(("dots", (False, False)))
    return min(ways, key=lambda way: cost(way[0], shape, active, way[1], k, rates, tiles))


@dataclass(frozen=True)
class Side:
    """The rows or the columns of one matrix.

    Attributes:
        taken: int32, sorted, the taken ones; None for all.
    """

    taken: Tensor | None = None

    def take(self, x_TP: Tensor) -> Tensor:
        """The taken columns of x; x itself if it has no others."""
        if self.taken is None or x_TP.shape[1] == len(self.taken):
            return x_TP
        return x_TP.index_select(1, self.taken)


@dataclass(frozen=True)
class Product:
    """The prepared computation of one matrix's entries.

    Attributes:
        kind: way, see the module.
        shape: rows and columns of the matrix.
        rows, columns: the taken rows and columns.
        places: [k], in the index's type: each entry's place in the product of the taken rows and columns (dense; None
            if equal to the index), or its column there (sampled).
        starts: int32 or int64 [taken rows + 1], first entry of each row (sampled).
        tiles: the tiles that hold entries (tiles).
        dots: the entries in the kernel's layout (dots).
    """

    kind: Kind
    shape: tuple[int, int]
    rows: Side
    columns: Side
    places: Tensor | None = None
    starts: Tensor | None = None
    tiles: kernels.Tiles | None = None
    dots: dots.Dots | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors of the product."""
        kept = [self.rows.taken, self.columns.taken, self.places, self.starts]
        if self.tiles is not None:
            kept += [self.tiles.tiles, self.tiles.starts, self.tiles.order]
        if self.dots is not None:
            kept += [self.dots.slots, self.dots.entries, self.dots.starts]
        return [tensor for tensor in kept if tensor is not None]

    def entries(self, left_TP: Tensor, right_TQ: Tensor, index: Tensor) -> Tensor:
        """The entries of left^T right at `index`, for which the product was prepared; [k].

        Either side may be full or the result of its `take`.
        """
        if self.tiles is not None and kernels.usable(left_TP, right_TQ):
            return kernels.tile_entries(left_TP, right_TQ, index, self.tiles)
        if self.dots is not None and dots.usable(left_TP, right_TQ):
            return dots.dot_entries(left_TP, right_TQ, len(index), self.dots)
        left_TR, right_TC = self.rows.take(left_TP), self.columns.take(right_TQ)
        if self.kind == "sampled":
            return self._sampled(left_TR, right_TC)
        product_RC = torch.mm(left_TR.t(), right_TC)
        return product_RC.view(-1).index_select(0, index if self.places is None else self.places)

    def _sampled(self, left_TR: Tensor, right_TC: Tensor) -> Tensor:
        if left_TR.dtype not in (torch.float32, torch.float64):
            left_TR, right_TC = left_TR.float(), right_TC.float()
        assert self.starts is not None
        assert self.places is not None
        sums = _pattern(
            self.starts, self.places, left_TR.new_zeros(len(self.places)), (left_TR.shape[1], right_TC.shape[1])
        )
        for start, count, length in _parts(len(left_TR), torch.get_num_threads()):
            left_NRt = transposed(left_TR[start : start + count * length], count)
            right_NCt = transposed(right_TC[start : start + count * length], count)
            for left_Rt, right_Ct in zip(left_NRt, right_NCt, strict=True):
                torch.sparse.sampled_addmm(sums, left_Rt, right_Ct.t(), out=sums)
        return sums.values()


def _parts(tokens: int, threads: int) -> list[tuple[int, int, int]]:
    """(start, count, length) of the groups of equal parts that are transposed at once, each part by one thread.

    A part fits the cache, and its length avoids conflicts between its rows there.
    """
    if tokens == 0:
        return []
    count = max(1, min(threads, tokens // 64))
    length = tokens // (count * -(-tokens // (count * 512)))
    if length > 32 and length % 32 == 0:
        length -= 4
    step = count * length
    parts = [(start, count, length) for start in range(0, tokens - step + 1, step)]
    rest = tokens - step * len(parts)
    return [*parts, (tokens - rest, 1, rest)] if rest else parts


def transposed(x_TP: Tensor, count: int = 1) -> Tensor:
    """Transposes of `count` equal parts of x [T, P]: contiguous [count, P, T / count], each part by one thread.

    `channel_shuffle` transposes with vector instructions, 3 to 5 times as fast as a copy.
    """
    x_TP = x_TP.contiguous()
    length, width = len(x_TP) // count, x_TP.shape[1]
    size = length * width
    # As pixels of `size` channels in `length` groups, with the strides of channels-last.
    shuffled = torch.channel_shuffle(x_TP.as_strided((1, size, count, 1), (count * size, 1, size, size)), length)
    return shuffled.as_strided((count, width, length), (size, length, 1))


def _pattern(starts: Tensor, column_k: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, column_k, values, shape, check_invariants=False)


def prepare(index: Tensor, shape: tuple[int, ...], kind: Kind | None = None) -> Product:
    """Choose the cheapest product for a matrix, and prepare it on the device of `index`.

    Args:
        index: int32 or int64 [k], sorted flat indices.
        shape: rows and columns of the matrix.
        kind: way to use instead of the cheapest.
    """
    height, width = shape
    row_k = torch.div(index, width, rounding_mode="floor")
    column_k = index - row_k * width
    # Marks instead of sorted sets: one wait for the device.
    marked = [_mark(row_k, height), _mark(column_k, width)]
    rates = CPU if index.device.type == "cpu" else GPU
    if rates.tile is not None:
        marked.append(_mark(*kernels.tile_numbers(row_k, column_k, (height, width))))
    height_held, width_held, *tiles = torch.stack([marks.sum() for marks in marked]).tolist()
    best, taken = choose((height, width), (height_held, width_held), len(index), rates, *tiles)
    if kind is not None and kind != best:
        best, taken = kind, (False, False)
    if best == "tiles":
        made = kernels.make_tiles(row_k, column_k, width)
        return Product(best, (height, width), Side(), Side(), tiles=made)
    if best == "dots":
        laid = dots.make_dots(row_k, column_k, (height, width))
        return Product(best, (height, width), Side(), Side(), dots=laid)
    rows, columns = (marks.nonzero().view(-1) if take else None for marks, take in zip(marked, taken))
    row_side, row_place_k = _side(rows, row_k)
    column_side, column_place_k = _side(columns, column_k)
    if best == "dense":
        places = row_place_k * (width if columns is None else len(columns)) + column_place_k if any(taken) else None
        return Product(best, (height, width), row_side, column_side, places)
    counts = torch.bincount(row_k, minlength=height)
    counts = counts if rows is None else counts[rows]
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(index.dtype)
    with warnings.catch_warnings():
        # PyTorch warns once per process that sparse CSR tensors are in beta.
        warnings.simplefilter("ignore")
        _pattern(starts[:1], index[:0], torch.empty(0), (0, 0))
    return Product(best, (height, width), row_side, column_side, column_place_k, starts)


def _mark(at_k: Tensor, size: int) -> Tensor:
    """Which of `size` positions occur; bool [size]."""
    return torch.zeros(size, dtype=torch.bool, device=at_k.device).index_fill_(0, at_k.long(), True)


def _side(active: Tensor | None, at_k: Tensor) -> tuple[Side, Tensor]:
    """The taken rows or columns, and each entry's place among them, in the type of `at_k`."""
    if active is None:
        return Side(), at_k
    return Side(active.to(torch.int32)), torch.searchsorted(active.to(at_k.dtype), at_k).to(at_k.dtype)
