"""A Triton kernel that forms only those tiles of a weight's gradient that hold entries, and writes only the entries.

Imports without Triton; `usable` says whether the kernel can run.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from irdscale.utils.triton_device import comes_out_right, interpreting, why_not_on

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows and columns of a tile.
TILE = 64
# Entries gathered at once.
ENTRIES = 256
# Tokens at once, warps, stages: the most that fit the 99 KiB of shared memory of the smallest GPU without spilling.
Block = tuple[int, int, int]
HALF_BLOCK: Block = (64, 4, 4)
FLOAT_BLOCK: Block = (32, 4, 3)
INTERPRETED_BLOCK: Block = (16, 4, 1)


def _tile_entries(  # type: ignore[no-untyped-def]
    left_ptr,
    right_ptr,
    index_ptr,
    order_ptr,
    tiles_ptr,
    starts_ptr,
    values_ptr,
    rows,
    columns,
    tokens,
    left_t,
    left_p,
    right_t,
    right_q,
    TILE: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of left^T right in registers, of which the entries in it are written."""
    program = tl.program_id(0)
    tile = tl.load(tiles_ptr + program).to(tl.int64)
    tiles_q = tl.cdiv(columns, TILE)
    first_p, first_q = (tile // tiles_q) * TILE, (tile % tiles_q) * TILE

    # Any product with a stride may pass 2^31.
    p = first_p + tl.arange(0, TILE)
    q = first_q + tl.arange(0, TILE)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    left_PT = left_ptr + p[:, None] * left_p + t[None, :] * left_t
    right_TQ = right_ptr + t[:, None] * right_t + q[None, :] * right_q
    in_p, in_q = p[:, None] < rows, q[None, :] < columns

    gradient_PQ = tl.zeros((TILE, TILE), tl.float32)
    start = tl.zeros((), tl.int64)
    for _ in range(tl.cdiv(tokens, BLOCK_T)):
        in_t = start + t < tokens
        left = tl.load(left_PT + start * left_t, in_p & in_t[None, :], 0.0)
        right = tl.load(right_TQ + start * right_t, in_q & in_t[:, None], 0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        gradient_PQ = tl.dot(left, right, gradient_PQ, input_precision="ieee")
        start += BLOCK_T

    gradient = tl.reshape(gradient_PQ, (TILE * TILE,))
    begin, end = tl.load(starts_ptr + program), tl.load(starts_ptr + program + 1)
    for at in range(begin, end, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        held = entry < end
        k = tl.load(order_ptr + entry, held, 0).to(tl.int64)
        flat = tl.load(index_ptr + k, held, first_p * columns + first_q).to(tl.int64)
        place = (flat // columns - first_p) * TILE + (flat % columns - first_q)
        tl.store(values_ptr + k, tl.gather(gradient, place.to(tl.int32), 0), held)


@dataclass(frozen=True)
class Tiles:
    """The tiles of a matrix that hold entries.

    Attributes:
        tiles: int32 [N], which ones, counted row by row.
        starts: int32 [N + 1], where each tile's entries start in `order`.
        order: int32 [k], the entries tile by tile.
    """

    tiles: Tensor
    starts: Tensor
    order: Tensor


def tile_numbers(row_k: Tensor, column_k: Tensor, shape: tuple[int, int]) -> tuple[Tensor, int]:
    """The tile of each of the entries at these rows and columns of a matrix, and how many tiles there are."""
    return _tile_of(row_k, column_k, shape[1]), -(-shape[0] // TILE) * -(-shape[1] // TILE)


def make_tiles(row_k: Tensor, column_k: Tensor, width: int) -> Tiles:
    """Sort the entries at these rows and columns of a matrix of `width` by tile."""
    tile_k, order = _tile_of(row_k, column_k, width).sort(stable=True)
    tiles, counts = tile_k.unique_consecutive(return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Tiles(tiles.to(torch.int32), starts.to(torch.int32), order.to(torch.int32))


def _tile_of(row_k: Tensor, column_k: Tensor, width: int) -> Tensor:
    return (row_k // TILE).long() * -(-width // TILE) + column_k // TILE


def usable(left_TP: Tensor, right_TQ: Tensor) -> bool:
    """Whether the kernel can take these: Triton is there and works, on their device and for their data types.

    The first call for a device and data type runs the kernel on a small example, and logs a failure once.
    """
    if why_not(left_TP, right_TQ) is not None:
        return False
    return interpreting() or _works(left_TP.device, left_TP.dtype)


def tile_entries(left_TP: Tensor, right_TQ: Tensor, index: Tensor, tiles: Tiles) -> Tensor:
    """The entries at `index`, those that `tiles` was made of, of left^T right; float32 [k].

    Args:
        left_TP, right_TQ: bfloat16, float16 or float32, both the same; any strides.
        index: int32 or int64 [k], flat, on the same device.

    Raises:
        ValueError: Triton is missing, or a tensor is not as above.
    """
    reason = why_not(left_TP, right_TQ)
    if reason is not None:
        raise ValueError(f"tile_entries: {reason}")
    return _entries(left_TP, right_TQ, index, tiles)


def why_not(left_TP: Tensor, right_TQ: Tensor) -> str | None:
    """What was found and expected where kernels cannot multiply these; None where they can."""
    if left_TP.dim() != 2 or right_TQ.dim() != 2 or len(left_TP) != len(right_TQ):
        return f"found shapes {list(left_TP.shape)} and {list(right_TQ.shape)}; expected [T, P] and [T, Q]"
    if left_TP.dtype not in DTYPES or left_TP.dtype != right_TQ.dtype:
        return f"found {left_TP.dtype} and {right_TQ.dtype}; expected two equal types of at most 32 bits"
    device = left_TP.device
    if device != right_TQ.device:
        return f"found devices {device} and {right_TQ.device}; expected one"
    return why_not_on(device)


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a small example comes out right."""
    # Not random, for the global generators are not ours to move.
    values = torch.arange(40 * 80, dtype=torch.float64).sin().view(40, 80)
    # Sizes that 16 divides, as layers have them: Triton compiles for others anew.
    left, right = values.to(device, dtype), values.cos().to(device, dtype)
    index = torch.arange(0, 80 * 80, 3, dtype=torch.int32, device=device)

    def example() -> tuple[Tensor, Tensor]:
        found = _entries(left, right, index, make_tiles(index // 80, index % 80, 80))
        return found, (left.cpu().double().t() @ right.cpu().double()).view(-1)[index.cpu().long()]

    return comes_out_right("Sparse gradients", device, example)


def _entries(left_TP: Tensor, right_TQ: Tensor, index: Tensor, tiles: Tiles) -> Tensor:
    tokens, rows = left_TP.shape
    values = torch.zeros(len(index), dtype=torch.float32, device=left_TP.device)
    if tokens * len(index) == 0:
        return values
    block = FLOAT_BLOCK if left_TP.dtype == torch.float32 else HALF_BLOCK
    length, warps, stages = INTERPRETED_BLOCK if interpreting() else block
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(values.device) if values.is_cuda else nullcontext():
        _jitted()[(len(tiles.tiles),)](
            left_TP,
            right_TQ,
            index,
            tiles.order,
            tiles.tiles,
            tiles.starts,
            values,
            rows,
            right_TQ.shape[1],
            tokens,
            *left_TP.stride(),
            *right_TQ.stride(),
            TILE=TILE,
            ENTRIES=ENTRIES,
            # The interpreter multiplies the bits of bfloat16 as integers.
            WIDEN=interpreting(),
            BLOCK_T=length,
            num_warps=warps,
            num_stages=stages,
        )
    return values


@cache
def _jitted() -> Any:
    # Lengths change from batch to batch, and would each be compiled for again.
    return triton.jit(_tile_entries, do_not_specialize=["tokens"])
