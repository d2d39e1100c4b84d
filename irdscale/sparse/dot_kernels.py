"""Triton kernels of `irdscale.sparse.dots`. Imports without Triton."""

# Triton sets the types of a kernel's arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _jit(*varying: str) -> Callable[[Any], Any]:
    """Triton's decorator, which does not compile again for other values of `varying`; no decorator without Triton."""
    return (lambda function: function) if triton is None else triton.jit(do_not_specialize=varying)


@_jit()
def _rows(
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
    """Rows of the stream [WARPS, 16, 8 QUADS]: row 2 i + v at i + 8 v, tokens in the order of `_columns`.

    Each thread loads (Y = QUADS x 2 x WARPS x 8 i x 4) the values that the tensor cores expect in it.
    """
    # Full sectors of 32 bytes, read once: past the L1 cache, which holds the slab.
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
def _columns(column_ptr, WIDEN: tl.constexpr, QUADS: tl.constexpr, WARPS: tl.constexpr):
    """Columns of the slab [WARPS, 8 QUADS, 8]."""
    columns = tl.load(column_ptr)
    if WIDEN:
        columns = columns.to(tl.float32)
    columns = tl.reshape(columns, (WARPS, 8, 4, QUADS, 2))
    return tl.reshape(tl.permute(columns, (0, 3, 2, 4, 1)), (WARPS, 8 * QUADS, 8))


@_jit()
def _picked(
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
    """Multiply the columns of 8 entries per warp. Returns, in each thread, two sums and whether it holds their rows."""
    column_ptr = slab_ZT + (slots_Z & ((1 << ROW) - 1))[:, None] * (16 * QUADS)
    sums = tl.dot(rows_0, _columns(column_ptr, WIDEN, QUADS, WARPS), input_precision="ieee")
    sums = tl.dot(rows_1, _columns(column_ptr + 8 * QUADS, WIDEN, QUADS, WARPS), sums, input_precision="ieee")
    # A thread holds 2 of each column's 16 rows.
    sums = tl.permute(tl.reshape(sums, (WARPS, 2, 8, 4, 2)), (0, 2, 3, 1, 4))
    even, odd = tl.split(tl.reshape(sums, (32 * WARPS, 2, 2)))
    low, high = tl.split(even)
    other = pairs_Z.to(tl.int32) ^ own_Z
    even = tl.where(other < (1 << ROW), low, high)
    has_even = other < (2 << ROW)
    low, high = tl.split(odd)
    other = (pairs_Z >> 32).to(tl.int32) ^ own_Z
    return even, has_even, tl.where(other < (1 << ROW), low, high), other < (2 << ROW)


# The arguments that vary by batch or layer: one compiled variant serves all. One loop over registers, so it stays long.
@_jit(
    *("tokens", "rows", "columns", "stream_t", "stream_p", "parts"),
    *("first_chunk", "end_chunk", "chunks", "first_trip", "trips"),
)
def dot_blocks(
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
    """Sum over one block of tokens, for the entries in one part of the columns and some chunks of the rows."""
    block, part, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    HALF: tl.constexpr = 8 * QUADS
    TILE: tl.constexpr = 8 * WARPS
    SLOTS: tl.constexpr = 2 * TILE
    dtype: tl.constexpr = slab_ptr.dtype.element_ty
    chunk = first_chunk + split * chunks
    end_chunk = tl.minimum(chunk + chunks, end_chunk)

    # Loads are numbered by register, warp, and thread: 8 rows or columns x 4 tokens.
    y = tl.arange(0, 2 * QUADS * WARPS * 32)
    t = block * (2 * HALF) + (y & 3) * (2 * QUADS) + y // (32 * WARPS)
    # Beyond the last token the slab is zero, so any finite value of the stream will do.
    token_Y = tl.minimum(t, tokens - 1) * stream_t
    later_Y = tl.minimum(t + HALF, tokens - 1) * stream_t
    pair_Y = (y >> 5 & (WARPS - 1)) * 8 + (y >> 2 & 7)
    z = tl.arange(0, 32 * WARPS)
    i, c = z >> 2 & 7, z & 3
    # Neighbours in a warp must not be adjacent, or Triton gives them to one thread.
    pair_Z = (z >> 5) * 4 + ((c & 1) * 2 + (c >> 1))
    column_Z = (z >> 5) * 8 + ((i & 1) + (i & 2) * 2 + (i >> 2) * 2)
    own_Z = i << (ROW + 1)
    slab_ptr += block * columns * (2 * HALF)
    slab_ZT = slab_ptr + (c * (2 * QUADS))[:, None] + tl.arange(0, 2 * QUADS)[None, :]
    partials_ptr += (block * trips - first_trip) * SLOTS

    # The next chunk's rows and the next trip's entries are loaded while this one's are multiplied.
    last = rows - 1
    PAIRS: tl.constexpr = 8 * WARPS
    here_Y = chunk * PAIRS + pair_Y
    rows_0 = _rows(stream_ptr, token_Y, here_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS)
    rows_1 = _rows(stream_ptr, later_Y, here_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS)
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
        here_Y = chunk * PAIRS + pair_Y
        # Without tensor cores no registers are left for prefetching.
        if PACKED:
            next_0 = _rows(stream_ptr, token_Y, here_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS)
            next_1 = _rows(stream_ptr, later_Y, here_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS)
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
            rows_0 = _rows(stream_ptr, token_Y, here_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS)
            rows_1 = _rows(stream_ptr, later_Y, here_Y, stream_p, last, dtype, PACKED, WIDEN, QUADS, WARPS)


# `columns` stays specialised: Triton must know that 16 divides it to copy 16 bytes at once.
@_jit("tokens")
def copy_slab(x_ptr, slab_ptr, tokens, columns, x_t, x_q, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """Copy x [T, columns] as [T / TOKENS, columns, TOKENS], with zeros for missing tokens."""
    block = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.arange(0, TOKENS)
    held_TQ = (block * TOKENS + t < tokens)[:, None] & (q < columns)[None, :]
    x_TQ = tl.load(x_ptr + (block * TOKENS + t)[:, None] * x_t + q[None, :] * x_q, held_TQ, 0.0)
    slab_QT = slab_ptr + (block * columns + q)[:, None] * TOKENS + t[None, :]
    tl.store(slab_QT, tl.trans(x_TQ), (q < columns)[:, None])


@_jit("blocks", "slots")
def add_blocks(partials_ptr, entries_ptr, values_ptr, blocks, slots, SLOTS: tl.constexpr, BLOCKS: tl.constexpr):
    """Add up the sums of all blocks of tokens, and write each slot's total to its entry."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    entry = tl.load(entries_ptr + slot, slot < slots, -1)
    block = tl.arange(0, BLOCKS)
    sums_BS = tl.zeros((BLOCKS, SLOTS), tl.float32)
    for first in range(0, blocks, BLOCKS):
        at = (first + block).to(tl.int64)[:, None] * slots + slot[None, :]
        sums_BS += tl.load(partials_ptr + at, (first + block < blocks)[:, None] & (entry >= 0)[None, :], 0.0)
    tl.store(values_ptr + entry, tl.sum(sums_BS, 0), entry >= 0)
