"""The Triton kernel against a float64 oracle, on the GPU or in Triton's interpreter.

Run by test_kernels.py in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from irdscale.fisher import kernels, squares
from irdscale.fisher.terms import Outer
from tests.kernels import DEVICE, INTERPRETED, close, draw

P, Q = 21, 40
BLOCK_P, BLOCK_Q, BLOCK_T = kernels.INTERPRETED_TILE[:3]
# Each type of data is compiled for again on a GPU.
DTYPES = kernels.DTYPES if INTERPRETED else (torch.bfloat16, torch.float32)


def oracle(left_BTP: Tensor, right_BTQ: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over samples and each sample's sum, from gradients formed one by one in float64."""
    total_PQ = torch.zeros(left_BTP.shape[2], right_BTQ.shape[2], dtype=torch.float64)
    trace_B = torch.zeros(len(left_BTP), dtype=torch.float64)
    for n, (left_TP, right_TQ) in enumerate(zip(left_BTP.cpu().double(), right_BTQ.cpu().double(), strict=True)):
        gradient_PQ = torch.zeros_like(total_PQ)
        for left_P, right_Q in zip(left_TP, right_TQ, strict=True):
            gradient_PQ += torch.outer(left_P, right_Q)
        total_PQ += gradient_PQ**2
        trace_B[n] = (gradient_PQ**2).sum()
    return total_PQ, trace_B


def check(left_BTP: Tensor, right_BTQ: Tensor, total_PQ: Tensor | None = None) -> None:
    """With and without traces, on top of what total and traces hold."""
    added_PQ, added_B = oracle(left_BTP, right_BTQ)
    if total_PQ is None:
        total_PQ = draw(*added_PQ.shape, seed=2).square()
    before_PQ, before_B = total_PQ.cpu().double(), draw(len(left_BTP), dtype=torch.float64, seed=3)
    trace_B = before_B.clone()
    assert kernels.usable(left_BTP, right_BTQ, total_PQ)
    kernels.add_squared_products(left_BTP, right_BTQ, total_PQ, trace_B)
    close(total_PQ, before_PQ + added_PQ)
    close(trace_B, before_B.cpu() + added_B)
    kernels.add_squared_products(left_BTP, right_BTQ, total_PQ)
    close(total_PQ, before_PQ + 2 * added_PQ)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype: torch.dtype) -> None:
    check(draw(3, 21, P, dtype=dtype), draw(3, 21, Q, dtype=dtype, seed=1))


@pytest.mark.parametrize(
    ("batch", "tokens", "rows", "columns"),
    [
        (1, BLOCK_T, BLOCK_P, BLOCK_Q),
        (2, 3 * BLOCK_T + 1, BLOCK_P - 1, BLOCK_Q + 1),
        (4, 1, P, Q),
        (1, 5, 1, 1),
        (2, 2 * BLOCK_T, 2 * BLOCK_P, 1),
        (2, 3 * BLOCK_T + 1, 5 * BLOCK_P, 3 * BLOCK_Q),
        (1, 1, 16, 16),
    ],
)
def test_sizes(batch: int, tokens: int, rows: int, columns: int) -> None:
    check(draw(batch, tokens, rows), draw(batch, tokens, columns, seed=1))


@pytest.mark.parametrize("kind", ["contiguous", "tokens outermost", "padded", "one sample for all"])
def test_aligned_layouts(kind: str) -> None:
    rows, columns = BLOCK_P + 16, 2 * BLOCK_Q + 16
    left_BTP, right_BTQ = draw(3, 21, rows, dtype=torch.bfloat16), draw(3, 21, columns, dtype=torch.bfloat16, seed=1)
    total_PQ = draw(rows, columns, seed=2).square()
    if kind == "padded":
        left_BTP, total_PQ = torch.cat([left_BTP, left_BTP], 2)[..., 16 : 16 + rows], total_PQ.repeat(1, 2)[:, :columns]
    elif kind != "contiguous":
        left_BTP = STRIDED[kind](left_BTP)
    assert kernels._choose(left_BTP, right_BTQ, total_PQ)[1]
    check(left_BTP, right_BTQ, total_PQ)


@pytest.mark.parametrize("kind", ["starts between", "odd rows", "odd columns", "a transposed total"])
def test_one_thing_unaligned(kind: str) -> None:
    rows, columns = BLOCK_P + 16 - (kind == "odd rows"), BLOCK_Q + 16 - (kind == "odd columns")
    left_BTP, right_BTQ = draw(3, 21, rows, dtype=torch.bfloat16), draw(3, 21, columns, dtype=torch.bfloat16, seed=1)
    total_PQ = draw(rows, columns, seed=2).square()
    if kind == "starts between":
        left_BTP = draw(3 * 21 * rows + 1, dtype=torch.bfloat16)[1:].view(3, 21, rows)
    if kind == "a transposed total":
        total_PQ = total_PQ.t().contiguous().t()
    assert not kernels._choose(left_BTP, right_BTQ, total_PQ)[1]
    check(left_BTP, right_BTQ, total_PQ)


def test_every_tile_is_met_once() -> None:
    rows = (kernels.GROUP + 3) * BLOCK_P - 5
    check(draw(2, 3, rows), draw(2, 3, 2 * BLOCK_Q + 2, seed=1))


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens innermost": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "a slice": lambda x: torch.cat([x, x + 1, x - 1], 2)[..., x.shape[2] : 2 * x.shape[2]],
    "every second": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "one sample for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_strides(kind: str) -> None:
    left_BTP, right_BTQ = draw(3, 21, P, dtype=torch.bfloat16), draw(3, 21, Q, dtype=torch.bfloat16, seed=1)
    strided = STRIDED[kind]
    assert not strided(left_BTP).is_contiguous()
    check(strided(left_BTP), right_BTQ)
    check(left_BTP, strided(right_BTQ), draw(Q, P, seed=2).t())
    check(strided(left_BTP), strided(right_BTQ), draw(P, 2 * Q, seed=2)[:, ::2])


@pytest.mark.parametrize("shape", [(0, 5, P, Q), (3, 0, P, Q), (3, 5, 0, Q), (3, 5, P, 0)])
def test_nothing_to_add(shape: tuple[int, int, int, int]) -> None:
    batch, tokens, rows, columns = shape
    check(draw(batch, tokens, rows), draw(batch, tokens, columns))


@pytest.mark.skipif(not INTERPRETED, reason="takes sparse files, which a GPU has not")
@pytest.mark.parametrize("far", ["sample", "token", "row", "total"])
def test_offsets_beyond_31_bits(far: str, tmp_path: Path) -> None:
    def spread(shape: tuple[int, ...], dimension: int, dtype: torch.dtype) -> Tensor:
        """A tensor whose indices along one dimension lie 2^31 elements apart at most."""
        step = -(-(2**31) // (shape[dimension] - 1))
        strides = [128, 1] if len(shape) == 2 else [4096, 128, 1]
        strides[dimension] = step
        size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=dtype)
        return flat.as_strided(shape, strides)

    left_BTP, right_BTQ = draw(3, 20, P, dtype=torch.bfloat16), draw(3, 20, Q, dtype=torch.bfloat16, seed=1)
    if far == "total":
        check(left_BTP, right_BTQ, spread((P, Q), 0, torch.float32))
        return
    spread_BTP = spread((3, 20, P), ("sample", "token", "row").index(far), torch.bfloat16)
    spread_BTP.copy_(left_BTP)
    check(spread_BTP, right_BTQ)


def test_float32_is_not_rounded() -> None:
    left_BTP, right_BTQ = draw(2, 40, P), draw(2, 40, Q, seed=1)
    total_PQ = torch.zeros(P, Q, device=DEVICE)
    kernels.add_squared_products(left_BTP, right_BTQ, total_PQ)
    expected = oracle(left_BTP, right_BTQ)[0]
    assert float(((total_PQ.cpu() - expected).abs() / expected.max()).max()) < 1e-6


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_every_tile_of_the_gpu(dtype: torch.dtype) -> None:
    tiles = set(kernels._tiles_of(dtype, (9, 0))) | set(kernels._tiles_of(dtype, (8, 6)))
    if not INTERPRETED:
        tiles = set(kernels._tiles(dtype, torch.device(DEVICE))[0])
    left_BTP, right_BTQ = draw(2, 70, 144, dtype=dtype), draw(2, 70, 80, dtype=dtype, seed=1)
    added_PQ, added_B = oracle(left_BTP, right_BTQ)
    # An unaligned layout has one tile, and test_types takes it.
    for tile in tiles if INTERPRETED else tiles - {kernels._tiles(dtype, torch.device(DEVICE))[0].unaligned}:
        total_PQ, trace_B = torch.zeros(144, 80, device=DEVICE), torch.zeros(2, dtype=torch.float64, device=DEVICE)
        kernels._add(tile, True, left_BTP, right_BTQ, total_PQ, trace_B)
        close(total_PQ, added_PQ)
        close(trace_B, added_B)


REFUSED: dict[str, tuple[Tensor, Tensor, Tensor, str]] = {
    "float64": (torch.ones(2, 3, 4).double(), torch.ones(2, 3, 5).double(), torch.ones(4, 5), "found torch.float64"),
    "float64 total": (torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(4, 5).double(), "torch.float64; expected"),
    "two types": (torch.ones(2, 3, 4).half(), torch.ones(2, 3, 5), torch.ones(4, 5), "two equal types"),
    "tokens": (torch.ones(2, 3, 4), torch.ones(2, 2, 5), torch.ones(4, 5), r"expected \[B, T, P\] and \[B, T, Q\]"),
    "total": (torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(5, 4), r"found a total of \[5, 4\]; expected \[4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    left, right, total, message = REFUSED[case]
    left, right, total = left.to(DEVICE), right.to(DEVICE), total.to(DEVICE)
    assert not kernels.usable(left, right, total)
    with pytest.raises(ValueError, match=message):
        kernels.add_squared_products(left, right, total)
    assert bool((total == 1).all())


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the sums use the kernel")
def test_squares_on_a_cpu_pass_it_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "add_squared_products", None)
    total = torch.zeros(P, Q)
    term = Outer(draw(2, 21, P), draw(2, 21, Q, seed=1))
    squares.add_squares([term], total, None, squares.Buffers())
    close(total, oracle(term.left_BTP, term.right_BTQ)[0])


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_squares_on_a_gpu_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.dtype] = []
    add = kernels.add_squared_products
    monkeypatch.setattr(
        kernels, "add_squared_products", lambda left, *rest: (taken.append(left.dtype), add(left, *rest))
    )
    term = Outer(draw(2, 21, P, dtype=torch.bfloat16), draw(2, 21, Q, dtype=torch.bfloat16, seed=1))
    total, trace = torch.zeros(P, Q, device=DEVICE), torch.zeros(2, dtype=torch.float64, device=DEVICE)
    squares.add_squares([term], total, trace, squares.Buffers())
    added_PQ, added_B = oracle(term.left_BTP, term.right_BTQ)
    close(total, added_PQ)
    close(trace, added_B)
    assert taken == [torch.bfloat16]
