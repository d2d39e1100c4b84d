"""A Triton kernel that squares per-sample gradients of a linear layer while they are in registers.

The module can be imported without Triton; `usable` returns whether the kernel can run.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irdscale.utils.triton_device import comes_out_right, interpreting, why_not_on

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# With lengths in multiples of this a kernel copies 16 bytes at once, for all data types.
UNIT = 16
# Rows of tiles whose columns neighbouring programs share, so that they stay in the L2 cache.
GROUP = 8


class Tile(NamedTuple):
    """Compile-time settings: a program's block of the gradient, the tokens of one step, and how they are computed."""

    block_p: int
    block_q: int
    block_t: int
    warps: int
    stages: int
    precision: str = "ieee"


class Tiles(NamedTuple):
    """The tiles of a data type on a device: for large gradients, small ones, and layouts that are not aligned."""

    large: Tile
    small: Tile
    unaligned: Tile


INTERPRETED_TILE = Tile(16, 32, 16, 4, 1)
# Registers hold a tile of the gradient and one of the sum; larger tiles do not fit.
HALF_ON_HOPPER = Tiles(Tile(128, 128, 64, 8, 5), Tile(64, 64, 64, 4, 4), Tile(64, 64, 32, 8, 2))
HALF = Tiles(Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4), Tile(64, 64, 32, 8, 2))
FLOAT = Tiles(Tile(128, 128, 16, 8, 3), Tile(64, 64, 16, 4, 3), Tile(64, 64, 16, 8, 3))
# tf32x3 is as exact as float32, and needs registers for the sum of a step beside the other two tiles.
FLOAT_ON_TENSOR_CORES = Tiles(
    Tile(64, 64, 16, 4, 3, "tf32x3"), Tile(64, 64, 16, 4, 3, "tf32x3"), Tile(64, 64, 16, 8, 3, "tf32x3")
)


# Over 60 lines: a kernel is one function, and most lines name its arguments.
def _squares(  # type: ignore[no-untyped-def]
    left_ptr,
    right_ptr,
    total_ptr,
    parts_ptr,
    rows: tl.int32,
    columns: tl.int32,
    batch: tl.int32,
    tokens: tl.int32,
    left_n: tl.int64,
    left_t: tl.int64,
    left_p: tl.int64,
    right_n: tl.int64,
    right_t: tl.int64,
    right_q: tl.int64,
    total_p: tl.int64,
    total_q: tl.int64,
    traced: tl.int32,
    ALIGNED: tl.constexpr,
    PREFETCH: tl.constexpr,
    WIDEN: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of total += sum_n (left_n^T right_n)^2, and its share of each sample's trace in parts [batch, tiles].

    ALIGNED: the last dimensions are contiguous, and other sizes and strides are given in multiples of UNIT.
    """
    # Products with a stride may exceed 2^31; the interpreter ignores the types above.
    left_n, left_t, right_n, right_t = (
        left_n.to(tl.int64),
        left_t.to(tl.int64),
        right_n.to(tl.int64),
        right_t.to(tl.int64),
    )
    if ALIGNED:
        rows, columns = rows * UNIT, columns * UNIT
        left_n, left_t, left_p = left_n * UNIT, left_t * UNIT, 1
        right_n, right_t, right_q = right_n * UNIT, right_t * UNIT, 1
        total_p, total_q = total_p * UNIT, 1
    tile = tl.program_id(0)
    tiles_p, tiles_q = tl.cdiv(rows, BLOCK_P), tl.cdiv(columns, BLOCK_Q)
    group = tile // (GROUP * tiles_q)
    height = min(tiles_p - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_q)
    first_p = (group * GROUP + within % height) * BLOCK_P
    first_q = (within // height) * BLOCK_Q

    p = (first_p + tl.arange(0, BLOCK_P)).to(tl.int64)
    q = (first_q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    in_p, in_q = p[None, :] < rows, q[None, :] < columns
    if PREFETCH:
        # The old sums are loaded into the L2 cache, in lines of 128 bytes, while the gradients are formed.
        line_p = tl.minimum(p, rows - 1)
        line_q = tl.minimum(first_q + 32 * tl.arange(0, BLOCK_Q // 32), columns - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [total_ptr + line_p[:, None] * total_p + line_q[None, :] * total_q],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    left_TP = left_ptr + t[:, None] * left_t + p[None, :] * left_p
    right_TQ = right_ptr + t[:, None] * right_t + q[None, :] * right_q
    sum_PQ = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for n in range(batch):
        left_at, right_at = left_TP + n * left_n, right_TQ + n * right_n
        gradient_PQ = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
        for start in range(0, tokens, BLOCK_T):
            in_t = (t < tokens - start)[:, None]
            left = tl.load(left_at, in_t & in_p, 0.0)
            right = tl.load(right_at, in_t & in_q, 0.0)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            gradient_PQ = tl.dot(tl.trans(left), right, gradient_PQ, input_precision=PRECISION)
            left_at += BLOCK_T * left_t
            right_at += BLOCK_T * right_t
        square_PQ = gradient_PQ * gradient_PQ
        sum_PQ += square_PQ
        if traced:
            tl.store(parts_ptr + ((tiles_p * tiles_q).to(tl.int64) * n + tile), tl.sum(square_PQ))

    total_PQ = total_ptr + p[:, None] * total_p + q[None, :] * total_q
    inside = (p[:, None] < rows) & in_q
    tl.store(total_PQ, tl.load(total_PQ, inside, 0.0) + sum_PQ, inside)


def usable(left_BTP: Tensor, right_BTQ: Tensor, total_PQ: Tensor) -> bool:
    """Whether the kernel can run: Triton is installed and works on this device, for these data types and shapes.

    The first call for each compiled kernel runs it on a small example, and logs a failure once.
    """
    if _why_not(left_BTP, right_BTQ, total_PQ) is not None:
        return False
    if interpreting() or _empty(left_BTP, right_BTQ):
        return True
    return _works(left_BTP.device, left_BTP.dtype, *_choose(left_BTP, right_BTQ, total_PQ))


def add_squared_products(left_BTP: Tensor, right_BTQ: Tensor, total_PQ: Tensor, trace_B: Tensor | None = None) -> None:
    """total_PQ += sum_n (left_n^T right_n)^2, and trace_B[n] += sum of (left_n^T right_n)^2, in place.

    Products are summed in float32, and the result is reproducible on the same kind of device. Triton compiles once, and
    caches on disk, for all contiguous tensors whose sizes are multiples of 16; other tensors are slower.

    Args:
        left_BTP, right_BTQ: bfloat16, float16 or float32, both the same; any strides
        total_PQ: float32, on the same device; any strides
        trace_B: float64 [B], on the same device

    Raises:
        ValueError: Triton is missing, or a tensor is not as above.
    """
    reason = _why_not(left_BTP, right_BTQ, total_PQ)
    if reason is not None:
        raise ValueError(f"add_squared_products: {reason}")
    if not _empty(left_BTP, right_BTQ):
        _add(*_choose(left_BTP, right_BTQ, total_PQ), left_BTP, right_BTQ, total_PQ, trace_B)


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


def _empty(left_BTP: Tensor, right_BTQ: Tensor) -> bool:
    return left_BTP.numel() == 0 or right_BTQ.numel() == 0


def _choose(left_BTP: Tensor, right_BTQ: Tensor, total_PQ: Tensor) -> tuple[Tile, bool]:
    """The tile, and whether the layout is aligned."""
    aligned = all(_aligned(x) for x in (left_BTP, right_BTQ, total_PQ))
    if interpreting():
        return INTERPRETED_TILE, aligned
    tiles, processors = _tiles(left_BTP.dtype, left_BTP.device)
    rows, columns = total_PQ.shape
    return _tile(tiles, rows, columns, aligned, processors), aligned


def _tile(tiles: Tiles, rows: int, columns: int, aligned: bool, processors: int) -> Tile:
    """The large tile, unless the gradient is smaller or half of the multiprocessors would be idle."""
    if not aligned:
        return tiles.unaligned
    large = tiles.large
    fits = rows > large.block_p // 2 and columns > large.block_q // 2
    return large if fits and 2 * _count(rows, columns, large) > processors else tiles.small


def _aligned(x: Tensor) -> bool:
    *others, last = _strides(x)
    return last == 1 and all(length % UNIT == 0 for length in (*others, x.shape[-1], x.data_ptr()))


def _strides(x: Tensor) -> list[int]:
    # The stride of a dimension of size 1 is arbitrary.
    return [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]


@cache
def _tiles(dtype: torch.dtype, device: torch.device) -> tuple[Tiles, int]:
    """The tiles, and the number of multiprocessors."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _tiles_of(dtype, None if torch.version.hip else torch.cuda.get_device_capability(device)), processors


def _tiles_of(dtype: torch.dtype, capability: tuple[int, int] | None) -> Tiles:
    """The tiles for a compute capability; None for other vendors' GPUs."""
    if dtype == torch.float32:
        # On other GPUs, TF32 is at most three times as fast as float32, so three products gain nothing.
        return FLOAT_ON_TENSOR_CORES if capability in ((8, 0), (9, 0)) else FLOAT
    # Hopper and data centre Blackwell have twice the shared memory, from which they multiply.
    return HALF_ON_HOPPER if capability is not None and capability[0] in (9, 10) else HALF


@cache
def _works(device: torch.device, dtype: torch.dtype, tile: Tile, aligned: bool) -> bool:
    """Whether a small example is computed correctly."""
    # Not random, which would change the state of the global generators.
    values = torch.arange(2 * 80 * 144, dtype=torch.float64).sin().view(2, 80, 144)
    # The example compiles the same kernel as the real layers.
    rows = 112 if aligned else 111
    left, right = values[..., :rows].to(device, dtype).contiguous(), values.cos().to(device, dtype)
    total = torch.zeros(rows, 144, dtype=torch.float32, device=device)

    def example() -> tuple[Tensor, Tensor]:
        _add(tile, aligned, left, right, total, None)
        return total, torch.bmm(left.cpu().double().transpose(1, 2), right.cpu().double()).square().sum(0)

    return comes_out_right("Fisher squares", device, example)


def _add(
    tile: Tile, aligned: bool, left_BTP: Tensor, right_BTQ: Tensor, total_PQ: Tensor, trace_B: Tensor | None
) -> None:
    """One launch, of tensors that are not empty."""
    batch, tokens, rows = left_BTP.shape
    columns = right_BTQ.shape[2]
    count = _count(rows, columns, tile)
    traced = trace_B is not None
    # Without a trace the kernel does not write to its `parts`.
    parts = torch.empty(batch, count, dtype=torch.float32, device=total_PQ.device) if traced else total_PQ
    lengths = [rows, columns]
    strides = [stride for x in (left_BTP, right_BTQ, total_PQ) for stride in _strides(x)]
    if aligned:
        lengths, strides = [x // UNIT for x in lengths], [x // UNIT for x in strides]
    # Triton launches on the current device, which may be another than the tensors'.
    with torch.cuda.device(total_PQ.device) if total_PQ.is_cuda else nullcontext():
        _jitted(aligned)[(count,)](
            left_BTP,
            right_BTQ,
            total_PQ,
            parts,
            *lengths,
            batch,
            tokens,
            *strides,
            int(traced),
            **_constants(tile, aligned),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    if trace_B is not None:
        trace_B += parts.sum(1, dtype=torch.float64)


def _constants(tile: Tile, aligned: bool) -> dict[str, Any]:
    return {
        "ALIGNED": aligned,
        # The instruction exists only on NVIDIA GPUs.
        "PREFETCH": aligned and not interpreting() and torch.version.hip is None,
        # The interpreter multiplies the bits of bfloat16 as integers.
        "WIDEN": interpreting(),
        "UNIT": UNIT,
        "GROUP": GROUP,
        "PRECISION": tile.precision,
        "BLOCK_P": tile.block_p,
        "BLOCK_Q": tile.block_q,
        "BLOCK_T": tile.block_t,
    }


def _count(rows: int, columns: int, tile: Tile) -> int:
    return -(-rows // tile.block_p) * -(-columns // tile.block_q)


@cache
def _jitted(aligned: bool) -> Any:
    """The kernel, compiled once for each data type and tile, whatever the sizes and strides."""
    # Triton specializes for aligned pointers only.
    watched = ("_ptr",) if aligned else ()
    names = [x for x in inspect.signature(_squares).parameters if not x.isupper() and not x.endswith(watched)]
    return triton.jit(_squares, do_not_specialize=names)
