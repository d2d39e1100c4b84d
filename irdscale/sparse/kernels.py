"""A Triton kernel that computes only the tiles of a weight's gradient that hold entries, and writes only the entries.

Imports without Triton; `usable` says whether the kernel can run.
"""

from __future__ import annotations

from collections.abc import Callable
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
# Tokens per iteration, warps, stages: the most that fit 99 KiB of shared memory (the smallest GPU's) without spilling.
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
    """Compute one tile of left^T right in registers, and write its entries."""
    program = tl.program_id(0)
    tile = tl.load(tiles_ptr + program).to(tl.int64)
    tiles_q = tl.cdiv(columns, TILE)
    first_p, first_q = (tile // tiles_q) * TILE, (tile % tiles_q) * TILE

    # A product with a stride may exceed 2^31.
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
        tiles: int32 [N], their numbers, counted row by row.
        starts: int32 [N + 1], each tile's first place in `order`.
        order: int32 [k], the entries' numbers, tile by tile.
    """

    tiles: Tensor
    starts: Tensor
    order: Tensor


def tile_numbers(row_k: Tensor, column_k: Tensor, shape: tuple[int, int]) -> tuple[Tensor, int]:
    """The tile of each entry at these rows and columns of a matrix, and the number of tiles."""
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
    """Whether the kernel works on these tensors' device and data type.

    The first call for a device and data type runs a small example, and logs a failure once.
    """
    return why_not(left_TP, right_TQ) is None and (interpreting() or _works(left_TP.device, left_TP.dtype))


def tile_entries(left_TP: Tensor, right_TQ: Tensor, index: Tensor, tiles: Tiles) -> Tensor:
    """The entries of left^T right at `index`, from which `tiles` was made; float32 [k].

    Args:
        left_TP, right_TQ: bfloat16, float16 or float32, both the same; any strides.
        index: int32 or int64 [k], flat, on the same device.

    Raises:
        ValueError: Triton is missing, or a tensor is not as above.
    """
    reason = why_not(left_TP, right_TQ)
    if reason is not None:
        raise ValueError(f"tile_entries: {reason}")
    tokens, rows = left_TP.shape
    values = torch.zeros(len(index), dtype=torch.float32, device=left_TP.device)
    if tokens * len(index) == 0:
        return values
    block = FLOAT_BLOCK if left_TP.dtype == torch.float32 else HALF_BLOCK
    length, warps, stages = INTERPRETED_BLOCK if interpreting() else block
    # Triton launches on the current device, which may not be the tensors'.
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
            # Triton's interpreter multiplies bfloat16 values as integers.
            WIDEN=interpreting(),
            BLOCK_T=length,
            num_warps=warps,
            num_stages=stages,
        )
    return values


def why_not(left_TP: Tensor, right_TQ: Tensor) -> str | None:
    """What was found and expected if kernels cannot multiply these tensors; None if they can."""
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
    def entries(left_TP: Tensor, right_TQ: Tensor, row_k: Tensor, column_k: Tensor) -> Tensor:
        width = right_TQ.shape[1]
        return tile_entries(left_TP, right_TQ, row_k * width + column_k, make_tiles(row_k, column_k, width))

    return example_is_right("Sparse gradients", device, dtype, entries)


def example_is_right(
    what: str, device: torch.device, dtype: torch.dtype, entries: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> bool:
    """Whether a kernel computes a small example right; a failure is logged.

    Args:
        what: the work that is done without the kernel after a failure, for the log.
        entries: takes left [T, P], right [T, Q], and the rows and columns [k]; returns the entries of left^T right.
    """
    # Not random: the global random streams stay as they are. 16 divides the sizes, as it does those of layers: Triton
    # compiles another variant for other sizes.
    values = torch.arange(80 * 80, dtype=torch.float64).sin().view(80, 80)
    left, right = values.to(device, dtype), values.cos().to(device, dtype)
    index = torch.arange(0, 80 * 80, 3, dtype=torch.int32, device=device)

    def example() -> tuple[Tensor, Tensor]:
        found = entries(left, right, index // 80, index % 80)
        return found, (left.cpu().double().t() @ right.cpu().double()).view(-1)[index.cpu().long()]

    return comes_out_right(what, device, example)


@cache
def _jitted() -> Any:
    # The number of tokens varies by batch: one compiled variant serves all.
    return triton.jit(_tile_entries, do_not_specialize=["tokens"])
