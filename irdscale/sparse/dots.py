"""A Triton kernel for entries that scatter: one dot product over the tokens for each entry.

Of left^T right, the wider side is streamed as it lies; the narrower one, the slab, is copied once so that 64 tokens of
a column lie together (128 bytes). A program owns one block of tokens and a part of the slab's columns, which its
multiprocessor's L1 cache holds (128 KiB), and walks over the rows of the stream. Each warp takes 16 rows at a time,
reads the columns of their entries, multiplies them on tensor cores, and writes of each column the one row that its
entry wants. The sums of the blocks are added up by a second kernel, in the order of the blocks: no atomics.

Estimated, not measured, for [8192, 2048], 0.5 %, 4096 tokens, bfloat16, H100 (a dense product: 214 us, measured): L1 49
us, beside it issue 39 us (66 instructions for 16 slots a warp) and memory 28 us; then slab 8, sums 6, launches 10 us.

Imports without Triton; `usable` says whether the kernels can run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irdscale.sparse.kernels import why_not
from irdscale.utils.triton_device import comes_out_right, interpreting

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Bytes of a column of the slab in one block of tokens, and columns of a part: together what L1 holds.
COLUMN_BYTES, PART = 128, 1024
# Rows of the stream for a warp, warps of a program, rows of both; entries for a warp in a trip, in two tiles of 8.
GROUP, WARPS, SLOTS = 16, 16, 16
CHUNK = GROUP * WARPS
# A slot is the column in the slab, and from this bit on the row of the 16; 16 of those for no entry.
ROW = 26
EMPTY = GROUP << ROW
# Bytes that partial sums may take at once, where one chunk's do not take more.
PARTIALS = 64 * 2**20
# Columns copied at once, and partial sums added at once.
COPIED, ADDED, ADDED_BLOCKS = 128, 256, 8
# Programs are dealt out as for so many multiprocessors in the interpreter.
INTERPRETED_MULTIPROCESSORS = 4


def _jit(*varying: str) -> Callable[[Any], Any]:
    """Triton's decorator, which compiles no more than once for the values of `varying`, or none without Triton."""
    return (lambda function: function) if triton is None else triton.jit(do_not_specialize=varying)


@_jit()
def _rows(  # type: ignore[no-untyped-def]
    stream_ptr,
    token_Y,
    pair_Y,
    stream_p,
    last_p,
    dtype: tl.constexpr,
    PACKED: tl.constexpr,
    WIDEN: tl.constexpr,
    QUADS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """[WARPS, 16, 8 QUADS] of the stream: row 2 i + v as i + 8 v, and tokens in the order of `_columns`.

    What is loaded, Y = QUADS x 2 x WARPS x 8 i x 4, lies in the threads that the tensor cores want it in.
    """
    # Whole sectors of 32 bytes, read once: past the L1 cache, which is for the slab.
    if PACKED:
        word = tl.load(stream_ptr + token_Y + tl.minimum(pair_Y, last_p // 2), cache_modifier=".cg")
        low = (word & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        high = (word >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        row = 2 * pair_Y.to(tl.int64)
        low = tl.load(stream_ptr + token_Y + tl.minimum(row, last_p) * stream_p)
        high = tl.load(stream_ptr + token_Y + tl.minimum(row + 1, last_p) * stream_p)
    if WIDEN:
        low, high = low.to(tl.float32), high.to(tl.float32)
    rows = tl.reshape(tl.join(low, high), (QUADS, 2, WARPS, 8, 4, 2))
    return tl.reshape(tl.permute(rows, (2, 5, 3, 0, 4, 1)), (WARPS, 16, 8 * QUADS))


@_jit()
def _columns(column_ptr, WIDEN: tl.constexpr, QUADS: tl.constexpr, WARPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[WARPS, 8 QUADS, 8] of the slab."""
    columns = tl.load(column_ptr)
    if WIDEN:
        columns = columns.to(tl.float32)
    columns = tl.reshape(columns, (WARPS, 8, 4, QUADS, 2))
    return tl.reshape(tl.permute(columns, (0, 3, 2, 4, 1)), (WARPS, 8 * QUADS, 8))


@_jit()
def _picked(  # type: ignore[no-untyped-def]
    slab_ZT,
    slots_Z,
    pairs_Z,
    rows_0,
    rows_1,
    own_Z,
    WIDEN: tl.constexpr,
    QUADS: tl.constexpr,
    WARPS: tl.constexpr,
    ROW: tl.constexpr,
):
    """Of 8 entries a warp, in each thread: the sums of two if it has their rows, and whether it has."""
    column_ptr = slab_ZT + (slots_Z & ((1 << ROW) - 1))[:, None] * (16 * QUADS)
    sums = tl.dot(rows_0, _columns(column_ptr, WIDEN, QUADS, WARPS), input_precision="ieee")
    sums = tl.dot(rows_1, _columns(column_ptr + 8 * QUADS, WIDEN, QUADS, WARPS), sums, input_precision="ieee")
    # Of each column's 16 rows, 2 are in a thread.
    sums = tl.permute(tl.reshape(sums, (WARPS, 2, 8, 4, 2)), (0, 2, 3, 1, 4))
    even, odd = tl.split(tl.reshape(sums, (32 * WARPS, 2, 2)))
    low, high = tl.split(even)
    other = pairs_Z.to(tl.int32) ^ own_Z
    even = tl.where(other < (1 << ROW), low, high)
    has_even = other < (2 << ROW)
    low, high = tl.split(odd)
    other = (pairs_Z >> 32).to(tl.int32) ^ own_Z
    return even, has_even, tl.where(other < (1 << ROW), low, high), other < (2 << ROW)


# All that changes from batch to batch or from layer to layer: one variant serves all.
@_jit(
    *("tokens", "rows", "columns", "stream_t", "stream_p", "parts"),
    *("first_chunk", "end_chunk", "chunks", "first_trip", "trips"),
)
def _dot_entries(  # type: ignore[no-untyped-def]
    stream_ptr,
    slab_ptr,
    slots_ptr,
    pairs_ptr,
    starts_ptr,
    partials_ptr,
    tokens,
    rows,
    columns,
    stream_t,
    stream_p,
    parts,
    first_chunk,
    end_chunk,
    chunks,
    first_trip,
    trips,
    PACKED: tl.constexpr,
    WIDEN: tl.constexpr,
    QUADS: tl.constexpr,
    WARPS: tl.constexpr,
    ROW: tl.constexpr,
):
    """The sums over one block of tokens, of the entries in one part of the columns and some chunks of the rows."""
    block, part, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    HALF: tl.constexpr = 8 * QUADS
    TILE: tl.constexpr = 8 * WARPS
    SLOTS: tl.constexpr = 2 * TILE
    dtype: tl.constexpr = slab_ptr.dtype.element_ty
    chunk = first_chunk + split * chunks
    end_chunk = tl.minimum(chunk + chunks, end_chunk)

    # All that is loaded is numbered by register, warp, and thread: 8 rows or columns x 4 tokens.
    y = tl.arange(0, 2 * QUADS * WARPS * 32)
    t = block * (2 * HALF) + (y & 3) * (2 * QUADS) + y // (32 * WARPS)
    # Beyond the last token the slab is zero, and any finite number will do.
    token_Y = tl.minimum(t, tokens - 1) * stream_t
    later_Y = tl.minimum(t + HALF, tokens - 1) * stream_t
    pair_Y = (y >> 5 & (WARPS - 1)) * 8 + (y >> 2 & 7)
    z = tl.arange(0, 32 * WARPS)
    i, c = z >> 2 & 7, z & 3
    # Neighbours in a warp must not lie side by side, or Triton gives them to one thread.
    pair_Z = (z >> 5) * 4 + ((c & 1) * 2 + (c >> 1))
    column_Z = (z >> 5) * 8 + ((i & 1) + (i & 2) * 2 + (i >> 2) * 2)
    own_Z = i << (ROW + 1)
    slab_ptr += block * columns * (2 * HALF)
    slab_ZT = slab_ptr + (c * (2 * QUADS))[:, None] + tl.arange(0, 2 * QUADS)[None, :]
    partials_ptr += (block * trips - first_trip) * SLOTS

    # The next chunk's rows and the next trip's entries are loaded while this one's are multiplied.
    last = rows - 1
    PAIRS: tl.constexpr = 8 * WARPS
    rows_0 = _rows(stream_ptr, token_Y, chunk * PAIRS + pair_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS)
    rows_1 = _rows(stream_ptr, later_Y, chunk * PAIRS + pair_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS)
    begin = tl.load(starts_ptr + chunk * parts + part)
    end = tl.load(starts_ptr + chunk * parts + part + 1)
    slots_ptr += column_Z
    pairs_ptr += pair_Z
    partials_ptr += 2 * pair_Z
    slots_0 = tl.load(slots_ptr + begin * SLOTS)
    slots_1 = tl.load(slots_ptr + begin * SLOTS + TILE)
    pairs_0 = tl.load(pairs_ptr + begin * TILE)
    pairs_1 = tl.load(pairs_ptr + begin * TILE + TILE // 2)
    for at in range(chunk, end_chunk):
        chunk = at + 1
        # Without tensor cores there are no registers to spare.
        if PACKED:
            next_0 = _rows(
                stream_ptr, token_Y, chunk * PAIRS + pair_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS
            )
            next_1 = _rows(
                stream_ptr, later_Y, chunk * PAIRS + pair_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS
            )
        known = tl.minimum(chunk, end_chunk - 1) * parts + part
        next_begin, next_end = tl.load(starts_ptr + known), tl.load(starts_ptr + known + 1)
        for trip in range(begin, end):
            following = tl.where(trip + 1 < end, trip + 1, next_begin)
            later_slots, later_pairs = slots_ptr + following * SLOTS, pairs_ptr + following * TILE
            next_slots_0, next_slots_1 = tl.load(later_slots), tl.load(later_slots + TILE)
            next_pairs_0, next_pairs_1 = tl.load(later_pairs), tl.load(later_pairs + TILE // 2)
            even_0, has_even_0, odd_0, has_odd_0 = _picked(
                slab_ZT, slots_0, pairs_0, rows_0, rows_1, own_Z, WIDEN, QUADS, WARPS, ROW
            )
            even_1, has_even_1, odd_1, has_odd_1 = _picked(
                slab_ZT, slots_1, pairs_1, rows_0, rows_1, own_Z, WIDEN, QUADS, WARPS, ROW
            )
            out = partials_ptr + trip * SLOTS
            tl.store(out, even_0, has_even_0)
            tl.store(out + 1, odd_0, has_odd_0)
            tl.store(out + TILE, even_1, has_even_1)
            tl.store(out + TILE + 1, odd_1, has_odd_1)
            slots_0, slots_1, pairs_0, pairs_1 = next_slots_0, next_slots_1, next_pairs_0, next_pairs_1
        begin, end = next_begin, next_end
        if PACKED:
            rows_0, rows_1 = next_0, next_1
        else:
            rows_0 = _rows(
                stream_ptr, token_Y, chunk * PAIRS + pair_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS
            )
            rows_1 = _rows(
                stream_ptr, later_Y, chunk * PAIRS + pair_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS
            )


# Of columns it must know that 16 divides them, to copy 16 bytes at once.
@_jit("tokens")
def _copy_slab(  # type: ignore[no-untyped-def]
    x_ptr, slab_ptr, tokens, columns, x_t, x_q, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    """[T / TOKENS, columns, TOKENS] of x [T, columns], with zeros for the tokens that are missing."""
    block = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.arange(0, TOKENS)
    held_TQ = (block * TOKENS + t < tokens)[:, None] & (q < columns)[None, :]
    x_TQ = tl.load(x_ptr + (block * TOKENS + t)[:, None] * x_t + q[None, :] * x_q, held_TQ, 0.0)
    slab_QT = slab_ptr + (block * columns + q)[:, None] * TOKENS + t[None, :]
    tl.store(slab_QT, tl.trans(x_TQ), (q < columns)[:, None])


@_jit("blocks", "slots")
def _add_blocks(  # type: ignore[no-untyped-def]
    partials_ptr, entries_ptr, values_ptr, blocks, slots, SLOTS: tl.constexpr, BLOCKS: tl.constexpr
):
    """The sums of all blocks of tokens, of the slots that hold an entry, written where the entry belongs."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    entry = tl.load(entries_ptr + slot, slot < slots, -1)
    block = tl.arange(0, BLOCKS)
    sums_BS = tl.zeros((BLOCKS, SLOTS), tl.float32)
    for first in range(0, blocks, BLOCKS):
        at = (first + block).to(tl.int64)[:, None] * slots + slot[None, :]
        sums_BS += tl.load(partials_ptr + at, (first + block < blocks)[:, None] & (entry >= 0)[None, :], 0.0)
    tl.store(values_ptr + entry, tl.sum(sums_BS, 0), entry >= 0)


@dataclass(frozen=True)
class Dots:
    """The entries of a matrix, laid out for the kernel: chunk by chunk of the stream, part by part of the slab.

    A trip is what a program does at once: up to 16 entries for each of 16 warps, in slots.

    Attributes:
        by_row: whether the rows of the matrix are streamed, and its columns are the slab; else the other way.
        slots: int32 [trips x 256], the entry's column in the slab + 2^26 x its row of the warp's 16; 2^30 for no entry.
        entries: int32 [trips x 256], which entry; -1 for none.
        starts: int32 [chunks x parts + 1], where each chunk's and part's trips start.
        chunk_starts: where each chunk's trips start, and how many there are, known to the host.
        parts: parts of the slab's columns.
    """

    by_row: bool
    slots: Tensor
    entries: Tensor
    starts: Tensor
    chunk_starts: tuple[int, ...]
    parts: int


def parts_of(slab: int) -> int:
    """Parts of so many columns of the slab."""
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
    # One at least, for a program finds the next trip from the last one.
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
    """Whether the kernels can take these: Triton is there and works, on their device and for their data types.

    The first call for a device and data type runs the kernels on a small example, and logs a failure once.
    """
    if why_not(left_TP, right_TQ) is not None:
        return False
    return interpreting() or _works(left_TP.device, left_TP.dtype)


def dot_entries(left_TP: Tensor, right_TQ: Tensor, k: int, dots: Dots) -> Tensor:
    """The entries that `dots` was made of, of left^T right; float32 [k].

    Args:
        left_TP, right_TQ: bfloat16, float16 or float32, both the same; any strides.
        k: how many entries there are.

    Raises:
        ValueError: Triton is missing, or a tensor is not as above.
    """
    reason = why_not(left_TP, right_TQ)
    if reason is not None:
        raise ValueError(f"dot_entries: {reason}")
    return _entries(left_TP, right_TQ, k, dots)


def _entries(left_TP: Tensor, right_TQ: Tensor, k: int, dots: Dots) -> Tensor:
    stream_TR, slab_TC = (left_TP, right_TQ) if dots.by_row else (right_TQ, left_TP)
    values = torch.zeros(k, dtype=torch.float32, device=stream_TR.device)
    if len(stream_TR) * k == 0:
        return values
    # Triton launches on the current device, which need not be the tensors'.
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
    _copy_slab[copy](slab_TC, slab, tokens, columns, *slab_TC.stride(), TOKENS=length, COLUMNS=COPIED, num_warps=4)
    packed = stream_TR.itemsize == 2
    stream = _pairs(stream_TR) if packed else stream_TR
    pairs = dots.slots.view(torch.int64)
    for first, end in _launches(dots.chunk_starts, 4 * blocks * SLOTS * WARPS):
        first_trip, trips = dots.chunk_starts[first], dots.chunk_starts[end] - dots.chunk_starts[first]
        partials = values.new_empty(blocks * trips * SLOTS * WARPS)
        each = -(-(end - first) // _splits(blocks * dots.parts, end - first, _multiprocessors(values.device)))
        _dot_entries[(blocks, dots.parts, -(-(end - first) // each))](
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
            # The interpreter multiplies the bits of bfloat16 as integers.
            WIDEN=interpreting(),
            QUADS=length // 16,
            WARPS=WARPS,
            ROW=ROW,
            num_warps=WARPS,
            num_stages=1,
        )
        slots = trips * SLOTS * WARPS
        entries = dots.entries[first_trip * SLOTS * WARPS :]
        _add_blocks[(-(-slots // ADDED),)](
            partials, entries, values, blocks, slots, SLOTS=ADDED, BLOCKS=ADDED_BLOCKS, num_warps=4
        )


def _pairs(x_TR: Tensor) -> Tensor:
    """Two numbers of 16 bits as one of 32, of a copy where they do not lie so."""
    if x_TR.stride(1) != 1 or any(number % 2 for number in (x_TR.shape[1], x_TR.stride(0), x_TR.storage_offset())):
        x_TR = F.pad(x_TR, (0, x_TR.shape[1] % 2)).contiguous()
    return x_TR.view(torch.int32)


def _launches(chunk_starts: tuple[int, ...], trip_bytes: int) -> list[tuple[int, int]]:
    """(first, end) chunks of each launch: equal numbers of them, so that partial sums stay within their bound."""
    chunks, trips = len(chunk_starts) - 1, chunk_starts[-1]
    count = min(chunks, max(1, -(-trips * trip_bytes // PARTIALS)))
    while True:
        ends = [chunks * n // count for n in range(count + 1)]
        most = max(chunk_starts[end] - chunk_starts[first] for first, end in pairwise(ends))
        if count == chunks or most * trip_bytes <= PARTIALS:
            return list(pairwise(ends))
        count += 1


def _splits(programs: int, chunks: int, multiprocessors: int) -> int:
    """How many programs share the chunks: those that are done first, where each starts with an empty cache."""
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
    """Whether a small example comes out right."""
    # Not random, for the global generators are not ours to move.
    values = torch.arange(80 * 64, dtype=torch.float64).sin().view(80, 64)
    left, right = values.to(device, dtype), values.cos().to(device, dtype)
    index = torch.arange(0, 64 * 64, 3, dtype=torch.int32, device=device)

    def example() -> tuple[Tensor, Tensor]:
        found = _entries(left, right, len(index), make_dots(index // 64, index % 64, (64, 64)))
        return found, (left.cpu().double().t() @ right.cpu().double()).view(-1)[index.cpu().long()]

    return comes_out_right("Scattered sparse gradients", device, example)
