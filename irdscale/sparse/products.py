"""Products that give k chosen entries of a matrix product, and the choice among them by what they cost.

Wanted are the entries at `index` of left^T right, [P, Q], summed over T tokens: a weight's gradient at its mask. Four
ways are equal but for rounding:

- `dense`: the product of the taken rows and columns (all of them, or those that hold an entry), then a gather. It
  multiplies much that is thrown away, at the speed of a matrix product.
- `sampled`: one dot product over the tokens for each entry (`torch.sparse.sampled_addmm`), which wants both sides
  transposed. It multiplies only what is kept, at a fraction of that speed.
- `tiles`: on a GPU, only those tiles of the product that hold an entry (`irdscale.sparse.kernels`), for entries that
  crowd.
- `dots`: on a GPU, one dot product over the tokens for each entry (`irdscale.sparse.dots`), for entries that scatter.

Where a kernel cannot run, the dense way is taken.

Everything is prepared from the indices and the shape. What is kept beside the indices has a number for each entry, its
place, and one for each row and column: finding the places anew costs about 1 % of a small model's step. `dots` keeps
two for each slot, of which there are some 1.25 an entry.
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
    """What the `dots` way costs, in the units of `Rates`.

    Attributes:
        entry: to multiply, add and write for one entry.
        row: to load one row of the wider side, for each part of the narrower one.
        copy: to copy one row or column of the narrower side.
        launch: to launch, whatever the size.
    """

    entry: float
    row: float
    copy: float
    launch: float


@dataclass(frozen=True)
class Rates:
    """What an operation costs, in multiplications-and-additions of a matrix product, for each token.

    The tokens themselves cancel out: every way's cost grows with them alike.

    Attributes:
        take: to take one row or column out (`index_select`; bound by memory).
        transpose: to transpose one row or column (bound by memory).
        read: to read one row or column from memory, which goes on beside multiplications.
        sampled: to multiply and add for one entry in a sampled product; None where there is none.
        tile: to multiply and add in a tile of the kernel's; None where there is none.
        tiles: how many tiles take as long as one, at once.
        dots: what the kernel for entries that scatter costs; None where there is none.
    """

    take: float
    transpose: float = 0.0
    read: float = 0.0
    sampled: float | None = None
    tile: float | None = None
    tiles: int = 1
    dots: DotRates | None = None


# 1 and 2 threads of AVX2 at T = 1024: 46-92 10^9 multiplications-and-additions a second in a product, 7-12 in a
# sampled one, 2.7 10^9 numbers taken, 4.6 10^9 transposed.
CPU = Rates(take=24, transpose=16, sampled=7)

# An H100. `irdscale bench gpu` measures the ways: correct here what it finds.
# Multiplications-and-additions a second of a matrix product: measured (0.214 ms for [8192, 2048] of 4096 tokens).
DENSE = 321e12
GPU = Rates(
    # 10^11 scattered numbers a second: estimated, not measured (a sector of 32 bytes for each, at 3.3 TB/s).
    take=DENSE / 1e11,
    # 2 bytes at 3 TB/s: estimated, not measured.
    read=DENSE * 2 / 3e12,
    # 88 10^12 a second: estimated, not measured (a tile of 64 x 64 does 16 for each byte from L2, of 5.5 TB/s).
    tile=DENSE / 88e12,
    # One for each multiprocessor: the data sheet.
    tiles=132,
    dots=DotRates(
        # 0.14 ps: estimated, not measured (24 cycles of L1 for 16 slots of 64 tokens, some 12 of them used, on 132
        # multiprocessors of 1.755 GHz, and 8 bytes of sums at 4 TB/s).
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
    """The cheapest way, and whether it takes only the active rows and columns; the plainer one of equals."""
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
        taken: int32, sorted, those that are taken; None for all.
    """

    taken: Tensor | None = None

    def take(self, x_TP: Tensor) -> Tensor:
        """The columns of x that are taken; x itself where it has no others."""
        if self.taken is None or x_TP.shape[1] == len(self.taken):
            return x_TP
        return x_TP.index_select(1, self.taken)


@dataclass(frozen=True)
class Product:
    """How the entries of one matrix are computed.

    Attributes:
        kind: see the module.
        shape: rows and columns of the matrix.
        rows, columns: what is taken of it.
        places: the index's type [k], where each entry lies in the product of what is taken (dense; None where that is
            the index), or its column there (sampled).
        starts: int32 or int64 [taken rows + 1], where each row's entries start (sampled).
        tiles: the tiles that hold entries (tiles).
        dots: the entries as the kernel takes them (dots).
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
        """All that is kept."""
        kept = [self.rows.taken, self.columns.taken, self.places, self.starts]
        if self.tiles is not None:
            kept += [self.tiles.tiles, self.tiles.starts, self.tiles.order]
        if self.dots is not None:
            kept += [self.dots.slots, self.dots.entries, self.dots.starts]
        return [tensor for tensor in kept if tensor is not None]

    def entries(self, left_TP: Tensor, right_TQ: Tensor, index: Tensor) -> Tensor:
        """The entries at `index`, the one that was prepared, of left^T right; [k].

        Either side may come whole or as what its `take` gave.
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
    """(start, count, length): equal parts that are transposed at once, one by each thread, in order.

    Parts stay in the cache, and are of lengths whose rows do not share lines of it.
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
    """x^T of `count` equal parts of x [T, P], contiguous [count, P, T / count], each part by one thread.

    `channel_shuffle` transposes with vector instructions, at 3 to 5 times the speed of a copy.
    """
    x_TP = x_TP.contiguous()
    length, width = len(x_TP) // count, x_TP.shape[1]
    size = length * width
    # Pixels of `size` channels in `length` groups, by strides that say that channels come last.
    shuffled = torch.channel_shuffle(x_TP.as_strided((1, size, count, 1), (count * size, 1, size, size)), length)
    return shuffled.as_strided((count, width, length), (size, length, 1))


def _pattern(starts: Tensor, column_k: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, column_k, values, shape, check_invariants=False)


def prepare(index: Tensor, shape: tuple[int, ...], kind: Kind | None = None) -> Product:
    """Choose the product for a matrix by what it costs, and make what it needs beside `index`, on its device.

    Args:
        index: int32 or int64 [k], sorted flat indices.
        shape: rows and columns of the whole matrix.
        kind: this one instead of the cheapest.
    """
    height, width = shape
    row_k = torch.div(index, width, rounding_mode="floor")
    column_k = index - row_k * width
    # Marks, not sorted sets, and one wait for the device.
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
        # PyTorch says once a process that these tensors are in beta.
        warnings.simplefilter("ignore")
        _pattern(starts[:1], index[:0], torch.empty(0), (0, 0))
    return Product(best, (height, width), row_side, column_side, column_place_k, starts)


def _mark(at_k: Tensor, size: int) -> Tensor:
    """Which of so many numbers occur."""
    return torch.zeros(size, dtype=torch.bool, device=at_k.device).index_fill_(0, at_k.long(), True)


def _side(active: Tensor | None, at_k: Tensor) -> tuple[Side, Tensor]:
    """What is taken, and where each entry lies in it, in the type of `at_k`."""
    if active is None:
        return Side(), at_k
    return Side(active.to(torch.int32)), torch.searchsorted(active.to(at_k.dtype), at_k).to(at_k.dtype)
