"""A Triton kernel that squares per-sample gradients of a linear layer while they are still in registers.

Imports without Triton; `usable` says whether the kernel can run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from irdscale.triton_device import interpreting, why_not_on

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = ("BLOCK_P", "BLOCK_Q", "BLOCK_T")
# The three blocks, warps, stages.
Tile = tuple[int, int, int, int, int]
# Registers must hold a tile of the gradient and one of the sum.
HALF_TILES: tuple[Tile, ...] = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (64, 256, 64, 8, 3),
    (64, 128, 64, 4, 3),
    (128, 64, 64, 4, 3),
    (64, 64, 32, 4, 3),
)
FLOAT_TILES: tuple[Tile, ...] = (
    (128, 128, 16, 8, 3),
    (64, 128, 16, 8, 3),
    (128, 64, 16, 8, 3),
    (64, 64, 32, 4, 3),
)
# Part of the sum spills from the registers, outside the inner loop, for it is read only where a sample ends.
LARGE_TILES: tuple[Tile, ...] = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
)
# Hopper and the data centre's Blackwell; on others the inner loop spills too.
LARGE_ON = (9, 10)
INTERPRETED_TILE: Tile = (16, 32, 16, 4, 1)
# Neighbouring programs share the columns of this many rows of tiles, which then stay in the L2 cache.
GROUP = 8


def _squares(  # type: ignore[no-untyped-def]
    left_ptr,
    right_ptr,
    total_ptr,
    parts_ptr,
    rows,
    columns,
    batch,
    tokens,
    length_class,
    left_n,
    left_t,
    left_p,
    right_n,
    right_t,
    right_q,
    total_p,
    total_q,
    TRACE: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of total += sum_n (left_n^T right_n)^2, and its share of each sample's trace in parts [tiles, batch]."""
    tile = tl.program_id(0)
    tiles_p, tiles_q = tl.cdiv(rows, BLOCK_P), tl.cdiv(columns, BLOCK_Q)
    group = tile // (GROUP * tiles_q)
    height = min(tiles_p - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_q)

    # Any product with a stride may pass 2^31.
    p = ((group * GROUP + within % height) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    q = ((within // height) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    left_PT = left_ptr + p[:, None] * left_p + t[None, :] * left_t
    right_TQ = right_ptr + t[:, None] * right_t + q[None, :] * right_q
    in_p, in_q = p[:, None] < rows, q[None, :] < columns

    sum_PQ = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    gradient_PQ = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    n = tl.zeros((), tl.int64)
    start = tl.zeros((), tl.int64)
    # One loop over all samples' tokens, so that the loads of the next sample are under way when one ends.
    for _ in range(batch * tl.cdiv(tokens, BLOCK_T)):
        in_t = start + t < tokens
        left = tl.load(left_PT + (n * left_n + start * left_t), in_p & in_t[None, :], 0.0)
        right = tl.load(right_TQ + (n * right_n + start * right_t), in_q & in_t[:, None], 0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        gradient_PQ = tl.dot(left, right, gradient_PQ, input_precision="ieee")
        ends = start + BLOCK_T >= tokens
        if ends:
            square_PQ = gradient_PQ * gradient_PQ
            sum_PQ += square_PQ
            if TRACE:
                tl.store(parts_ptr + (tile.to(tl.int64) * batch + n), tl.sum(square_PQ))
            gradient_PQ = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
        n = tl.where(ends, n + 1, n)
        start = tl.where(ends, 0, start + BLOCK_T)

    total_PQ = total_ptr + p[:, None] * total_p + q[None, :] * total_q
    tl.store(total_PQ, tl.load(total_PQ, in_p & in_q, 0.0) + sum_PQ, in_p & in_q)


def usable(left_BTP: Tensor, right_BTQ: Tensor, total_PQ: Tensor) -> bool:
    """Whether the kernel can take these: Triton is there and works, on their device and for their data types.

    The first call for a device and data type runs the kernel on a small example, and logs a failure once.
    """
    if _why_not(left_BTP, right_BTQ, total_PQ) is not None:
        return False
    return interpreting() or _works(left_BTP.device, left_BTP.dtype)


def add_squared_products(left_BTP: Tensor, right_BTQ: Tensor, total_PQ: Tensor, trace_B: Tensor | None = None) -> None:
    """total_PQ += sum_n (left_n^T right_n)^2, and trace_B[n] += sum of (left_n^T right_n)^2, in place.

    Products are summed in float32. The result is the same in each run with the same choice of tile, which is tuned
    once a process for each size of layer.

    Args:
        left_BTP, right_BTQ: bfloat16, float16 or float32, both the same; any strides.
        total_PQ: float32, on the same device; any strides.
        trace_B: float64 [B], on the same device.

    Raises:
        ValueError: Triton is missing, or a tensor is not as above.
    """
    reason = _why_not(left_BTP, right_BTQ, total_PQ)
    if reason is not None:
        raise ValueError(f"add_squared_products: {reason}")
    tiles = (INTERPRETED_TILE,) if interpreting() else _tiles(left_BTP.dtype, left_BTP.device)
    _add(tiles, left_BTP, right_BTQ, total_PQ, trace_B)


def _why_not(left_BTP: Tensor, right_BTQ: Tensor, total_PQ: Tensor) -> str | None:
    if left_BTP.dim() != 3 or right_BTQ.dim() != 3 or left_BTP.shape[:2] != right_BTQ.shape[:2]:
        return f"found shapes {list(left_BTP.shape)} and {list(right_BTQ.shape)}; expected [B, T, P] and [B, T, Q]"
    if total_PQ.shape != (left_BTP.shape[2], right_BTQ.shape[2]):
        return f"found a total of {list(total_PQ.shape)}; expected {[left_BTP.shape[2], right_BTQ.shape[2]]}"
    if left_BTP.dtype not in DTYPES or left_BTP.dtype != right_BTQ.dtype or total_PQ.dtype != torch.float32:
        found = ", ".join(str(x.dtype) for x in (left_BTP, right_BTQ, total_PQ))
        return f"found {found}; expected two equal types of at most 32 bits and torch.float32"
    device = left_BTP.device
    if not device == right_BTQ.device == total_PQ.device:
        return f"found devices {device}, {right_BTQ.device} and {total_PQ.device}; expected one"
    return why_not_on(device)


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a small example comes out right; Triton needs a C compiler and a driver that fits, for one."""
    tiles = _tiles(dtype, device)[-1:]
    # Not random, for the global generators are not ours to move.
    values = torch.arange(2 * 40 * 72, dtype=torch.float64).sin().view(2, 40, 72)
    left, right = values[..., :70].to(device, dtype), values.cos().to(device, dtype)
    total = torch.zeros(70, 72, dtype=torch.float32, device=device)
    try:
        _add(tiles, left, right, total, None)
        expected = torch.bmm(left.cpu().double().transpose(1, 2), right.cpu().double()).square().sum(0)
        error = float((total.cpu().double() - expected).abs().max() / expected.max())
    except Exception as problem:  # whatever a compiler or driver raises, the plain way works
        log.warning("Fisher squares go without their Triton kernel on %s: %s", device, problem)
        return False
    if not error < 1e-4:
        log.warning("Fisher squares go without their Triton kernel on %s: it is wrong by %.0e", device, error)
    return error < 1e-4


@cache
def _tiles(dtype: torch.dtype, device: torch.device) -> tuple[Tile, ...]:
    """The tiles to choose from; the last is the smallest."""
    if dtype == torch.float32:
        return FLOAT_TILES
    large = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in LARGE_ON
    return LARGE_TILES + HALF_TILES if large else HALF_TILES


def _add(
    tiles: tuple[Tile, ...],
    left_BTP: Tensor,
    right_BTQ: Tensor,
    total_PQ: Tensor,
    trace_B: Tensor | None,
    do_bench: Callable[..., Any] | None = None,
) -> None:
    """One launch with the best of `tiles`, by `do_bench` (Triton's own by default) where there are several."""
    batch, tokens, rows = left_BTP.shape
    columns = right_BTQ.shape[2]
    if batch * tokens * rows * columns == 0:
        return
    traced = trace_B is not None
    count = max(_count(rows, columns, *tile[:2]) for tile in tiles)
    parts_NB = torch.zeros((count, batch) if traced else (1, 1), dtype=torch.float32, device=total_PQ.device)
    # Tuned once for each power of two; multiples of 16 share a compiled kernel.
    length_class = max(16, triton.next_power_of_2(min(tokens, 4096)))
    kernel = _jitted() if len(tiles) == 1 else _tuned(tiles, do_bench)
    options = dict(zip((*BLOCKS, "num_warps", "num_stages"), tiles[0], strict=True)) if len(tiles) == 1 else {}
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(total_PQ.device) if total_PQ.is_cuda else nullcontext():
        kernel[lambda meta: (_count(rows, columns, meta["BLOCK_P"], meta["BLOCK_Q"]),)](
            left_BTP,
            right_BTQ,
            total_PQ,
            parts_NB,
            rows,
            columns,
            batch,
            tokens,
            length_class,
            *left_BTP.stride(),
            *right_BTQ.stride(),
            *total_PQ.stride(),
            TRACE=traced,
            GROUP=GROUP,
            # The interpreter multiplies the bits of bfloat16 as integers.
            WIDEN=interpreting(),
            **options,
        )
    if trace_B is not None:
        trace_B += parts_NB.sum(0, dtype=torch.float64)


def _count(rows: int, columns: int, block_p: int, block_q: int) -> int:
    return -(-rows // block_p) * -(-columns // block_q)


@cache
def _jitted() -> Any:
    # Lengths change from batch to batch, and would each be compiled for again.
    return triton.jit(_squares, do_not_specialize=["batch", "tokens"])


@cache
def _tuned(tiles: tuple[Tile, ...], do_bench: Callable[..., Any] | None) -> Any:
    """The kernel with its tile chosen on first use for a size.

    Tuning runs the kernel many times: the total is put back after each, and the parts are cleared at the end, for
    smaller tiles fill more rows of them.
    """
    configs = []
    for *blocks, warps, stages in tiles:
        blocks_by_name = dict(zip(BLOCKS, blocks, strict=True))
        configs.append(triton.Config(blocks_by_name, num_warps=warps, num_stages=stages))
    tune = triton.autotune(
        configs,
        key=["rows", "columns", "length_class", "TRACE"],
        restore_value=["total_ptr"],
        reset_to_zero=["parts_ptr"],
        do_bench=do_bench,
    )
    return tune(_jitted())
