"""Scattered entries of a product on a GPU: one dot product over the tokens for each entry, by Triton kernels.

The wider side of left^T right, the stream, is read in place. The narrower one, the slab, is copied once so that 64
tokens of a column are adjacent (128 bytes). A program owns one block of tokens and a part of the slab's columns, which
its multiprocessor's L1 cache holds (128 KiB), and loops over the rows of the stream. Each warp takes 16 rows at a time,
reads the columns of their entries, multiplies them on tensor cores, and writes one row of each column, its entry's. A
second kernel adds up the sums of the blocks in their order, without atomics.

Estimate for [8192, 2048], 0.5 %, 4096 tokens, bfloat16, H100 (a dense product: 214 us, measured): L1 49 us, in
parallel with instruction issue 39 us (66 instructions per warp for 16 slots) and memory 28 us; slab 8 us, sums 6 us,
launches 10 us.

Imports without Triton; `usable` says whether the kernels can run.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from irdscale.sparse.dot_kernels import add_blocks, copy_slab, dot_blocks
from irdscale.sparse.kernels import example_is_right, why_not
from irdscale.utils.triton_device import interpreting

# Bytes of a slab's column in one block of tokens, and columns of a part: their product is what L1 holds.
COLUMN_BYTES, PART = 128, 1024
# Rows of the stream per warp, warps per program, entries per warp and trip (two tiles of 8); rows per program.
GROUP, WARPS, SLOTS = 16, 16, 16
CHUNK = GROUP * WARPS
# A slot holds the slab's column, and from this bit on the row (0 to 15); row 16 for no entry.
ROW = 26
EMPTY = GROUP << ROW
# Most bytes of partial sums at once; those of one chunk may take more.
PARTIALS = 64 * 2**20
# Columns copied at once, and partial sums added at once.
COPIED, ADDED, ADDED_BLOCKS = 128, 256, 8
# Multiprocessors that Triton's interpreter stands for.
INTERPRETED_MULTIPROCESSORS = 4


@dataclass(frozen=True)
class Dots:
    """The entries of a matrix, laid out for the kernel: chunk by chunk of the stream, part by part of the slab.

    A trip is one iteration of a program: up to 16 entries for each of 16 warps, in slots.

    Attributes:
        by_row: whether the stream is the matrix's rows, and the slab its columns; else the other way.
        slots: int32 [trips x 256], the entry's column in the slab + 2^26 x its row in the warp; 2^30 for no entry.
        entries: int32 [trips x 256], number of the entry; -1 for none.
        starts: int32 [chunks x parts + 1], first trip of each chunk and part.
        chunk_starts: first trip of each chunk, and the number of trips, on the host.
        parts: parts of the slab's columns.
    """

    by_row: bool
    slots: Tensor
    entries: Tensor
    starts: Tensor
    chunk_starts: tuple[int, ...]
    parts: int


def parts_of(slab: int) -> int:
    """Number of parts of a slab with so many columns."""
    return -(-slab // PART)


def make_dots(row_k: Tensor, column_k: Tensor, shape: tuple[int, int]) -> Dots:
    """Lay out the entries at these rows and columns of a matrix; waits for the device once."""
    by_row = shape[0] >= shape[1]
    stream_k, slab_k = (row_k, column_k) if by_row else (column_k, row_k)
    parts = parts_of(min(shape))
    chunks = -(-max(shape) // CHUNK)
    group_k = (stream_k // CHUNK * parts + slab_k // PART) * WARPS + stream_k % CHUNK // GROUP
    order: Tensor | None = None
    if not by_row or parts > 1:
        group_k, order = group_k.sort(stable=True)
        stream_k, slab_k = stream_k[order], slab_k[order]
    groups = torch.arange(chunks * parts * WARPS + 1, device=group_k.device, dtype=group_k.dtype)
    first_G = torch.searchsorted(group_k, groups)
    most_F = first_G.diff().view(-1, WARPS).amax(1)
    # At least one, because a program finds its next trip from the last one.
    trips_F = torch.div(most_F + SLOTS - 1, SLOTS, rounding_mode="floor").clamp_min(1)
    starts = torch.cat([trips_F.new_zeros(1), trips_F.cumsum(0)])
    chunk_starts = tuple(starts[::parts].tolist())
    number_k = torch.arange(len(group_k), device=group_k.device)
    rank_k = number_k - first_G[group_k]
    tile_k = starts[group_k // WARPS] * (SLOTS // 8) + rank_k // 8
    place_k = (tile_k * WARPS + group_k % WARPS) * 8 + rank_k % 8
    size = chunk_starts[-1] * SLOTS * WARPS
    slots = torch.full((size,), EMPTY, dtype=torch.int32, device=group_k.device)
    entries = torch.full_like(slots, -1)
    slots[place_k] = (slab_k + (stream_k % GROUP << ROW)).to(torch.int32)
    entries[place_k] = (number_k if order is None else order).to(torch.int32)
    return Dots(by_row, slots, entries, starts.to(torch.int32), chunk_starts, parts)


def usable(left_TP: Tensor, right_TQ: Tensor) -> bool:
    """Whether the kernels work on these tensors' device and data type.

    The first call for a device and data type runs a small example, and logs a failure once.
    """
    return why_not(left_TP, right_TQ) is None and (interpreting() or _works(left_TP.device, left_TP.dtype))


def dot_entries(left_TP: Tensor, right_TQ: Tensor, k: int, dots: Dots) -> Tensor:
    """The entries of left^T right at the places in `dots`; float32 [k].

    Args:
        left_TP, right_TQ: bfloat16, float16 or float32, both the same; any strides.
        k: number of entries.

    Raises:
        ValueError: Triton is missing, or a tensor is not as above.
    """
    reason = why_not(left_TP, right_TQ)
    if reason is not None:
        raise ValueError(f"dot_entries: {reason}")
    stream_TR, slab_TC = (left_TP, right_TQ) if dots.by_row else (right_TQ, left_TP)
    values = torch.zeros(k, dtype=torch.float32, device=stream_TR.device)
    if len(stream_TR) * k == 0:
        return values
    # Triton launches on the current device, which may not be the tensors'.
    with torch.cuda.device(values.device) if values.is_cuda else nullcontext():
        _launch(stream_TR, slab_TC, dots, values)
    return values


def _launch(stream_TR: Tensor, slab_TC: Tensor, dots: Dots, values: Tensor) -> None:
    tokens, rows = stream_TR.shape
    columns = slab_TC.shape[1]
    length = COLUMN_BYTES // slab_TC.itemsize
    blocks = -(-tokens // length)
    slab = slab_TC.new_empty(blocks * columns * length)
    copy = (blocks, -(-columns // COPIED))
    copy_slab[copy](slab_TC, slab, tokens, columns, *slab_TC.stride(), TOKENS=length, COLUMNS=COPIED, num_warps=4)
    packed = stream_TR.itemsize == 2
    stream = _pairs(stream_TR) if packed else stream_TR
    pairs = dots.slots.view(torch.int64)
    for first, end in _launches(dots.chunk_starts, 4 * blocks * SLOTS * WARPS):
        first_trip, trips = dots.chunk_starts[first], dots.chunk_starts[end] - dots.chunk_starts[first]
        partials = values.new_empty(blocks * trips * SLOTS * WARPS)
        each = -(-(end - first) // _splits(blocks * dots.parts, end - first, _multiprocessors(values.device)))
        dot_blocks[(blocks, dots.parts, -(-(end - first) // each))](
            stream,
            slab,
            dots.slots,
            pairs,
            dots.starts,
            partials,
            tokens,
            rows,
            columns,
            *stream.stride(),
            dots.parts,
            first,
            end,
            each,
            first_trip,
            trips,
            PACKED=packed,
            # Triton's interpreter multiplies bfloat16 values as integers.
            WIDEN=interpreting(),
            QUADS=length // 16,
            WARPS=WARPS,
            ROW=ROW,
            num_warps=WARPS,
            num_stages=1,
        )
        slots = trips * SLOTS * WARPS
        entries = dots.entries[first_trip * SLOTS * WARPS :]
        add_blocks[(-(-slots // ADDED),)](
            partials, entries, values, blocks, slots, SLOTS=ADDED, BLOCKS=ADDED_BLOCKS, num_warps=4
        )


def _pairs(x_TR: Tensor) -> Tensor:
    """Pairs of 16-bit numbers as int32; a copy if they are not adjacent and aligned."""
    if x_TR.stride(1) != 1 or any(number % 2 for number in (x_TR.shape[1], x_TR.stride(0), x_TR.storage_offset())):
        x_TR = F.pad(x_TR, (0, x_TR.shape[1] % 2)).contiguous()
    return x_TR.view(torch.int32)


def _launches(chunk_starts: tuple[int, ...], trip_bytes: int) -> list[tuple[int, int]]:
    """(first, end) chunks of each launch: near-equal numbers of chunks whose partial sums fit `PARTIALS`."""
    chunks, trips = len(chunk_starts) - 1, chunk_starts[-1]
    count = min(chunks, max(1, -(-trips * trip_bytes // PARTIALS)))
    while True:
        ends = [chunks * n // count for n in range(count + 1)]
        most = max(chunk_starts[end] - chunk_starts[first] for first, end in pairwise(ends))
        if count == chunks or most * trip_bytes <= PARTIALS:
            return list(pairwise(ends))
        count += 1


def _splits(programs: int, chunks: int, multiprocessors: int) -> int:
    """Number of programs that share the chunks and finish first, if each starts with an empty cache."""
    return min(
        range(1, min(chunks, multiprocessors) + 1),
        key=lambda splits: -(-programs * splits // multiprocessors) * (1 + -(-chunks // splits)),
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    def entries(left_TP: Tensor, right_TQ: Tensor, row_k: Tensor, column_k: Tensor) -> Tensor:
        dots = make_dots(row_k, column_k, (left_TP.shape[1], right_TQ.shape[1]))
        return dot_entries(left_TP, right_TQ, len(row_k), dots)

    return example_is_right("Scattered sparse gradients", device, dtype, entries)
