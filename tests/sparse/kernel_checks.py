"""The Triton kernels against a float64 oracle, on the GPU or in Triton's interpreter.

Run by test_kernels.py in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from irdscale.sparse import dots, kernels, products
from irdscale.sparse.kernels import TILE
from irdscale.sparse.products import Kind, prepare
from tests.kernels import DEVICE, INTERPRETED, close, draw

BLOCK_T = kernels.INTERPRETED_BLOCK[0]
P, Q = TILE + 5, 2 * TILE + 9


def some(rows: int, columns: int, k: int) -> Tensor:
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(2))
    return order[:k].sort().values.to(DEVICE, torch.int32)


def oracle(left_TP: Tensor, right_TQ: Tensor, index: Tensor) -> Tensor:
    gradient = torch.zeros(left_TP.shape[1], right_TQ.shape[1], dtype=torch.float64)
    for left_P, right_Q in zip(left_TP.cpu().double(), right_TQ.cpu().double(), strict=True):
        gradient += torch.outer(left_P, right_Q)
    return gradient.view(-1)[index.cpu().long()]


def check(left_TP: Tensor, right_TQ: Tensor, index: Tensor) -> None:
    width = right_TQ.shape[1]
    tiles = kernels.make_tiles(index // width, index % width, width)
    numbers, _ = kernels.tile_numbers(index // width, index % width, (left_TP.shape[1], width))
    assert torch.equal(tiles.tiles.long(), numbers.unique())
    assert kernels.usable(left_TP, right_TQ)
    found = kernels.tile_entries(left_TP, right_TQ, index, tiles)
    assert found.dtype == torch.float32
    close(found, oracle(left_TP, right_TQ, index))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_types(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    check(draw(21, P, dtype=dtype), draw(21, Q, dtype=dtype, seed=1), some(P, Q, 300).to(index_dtype))


@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [
        (BLOCK_T, TILE, TILE),
        (3 * BLOCK_T + 1, TILE - 1, TILE + 1),
        (1, P, Q),
        (5, 1, 1),
        (2 * BLOCK_T, 2 * TILE, 1),
        (3, 1, 3 * TILE),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_sizes(tokens: int, rows: int, columns: int, share: float) -> None:
    index = some(rows, columns, max(1, int(share * rows * columns)))
    check(draw(tokens, rows), draw(tokens, columns, seed=1), index)


@pytest.mark.parametrize("at", [[0], [P * Q - 1], [TILE - 1, TILE], [(TILE - 1) * Q + 3, TILE * Q + 3]])
def test_single_entries_at_the_borders_of_tiles(at: list[int]) -> None:
    check(draw(9, P), draw(9, Q, seed=1), torch.tensor(at, dtype=torch.int32, device=DEVICE))


def test_tiles_without_entries_are_left_out() -> None:
    rows, columns = 4 * TILE, 5 * TILE
    index = torch.tensor([3, TILE * columns + 2 * TILE, rows * columns - 1], dtype=torch.int32, device=DEVICE)
    tiles = kernels.make_tiles(index // columns, index % columns, columns)
    assert tiles.tiles.tolist() == [0, 7, 19]
    assert tiles.starts.tolist() == [0, 1, 2, 3]
    check(draw(9, rows), draw(9, columns, seed=1), index)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens innermost": lambda x: x.t().contiguous().t(),
    "a slice": lambda x: torch.cat([x, x + 1, x - 1], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one token for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_strides(kind: str) -> None:
    left, right = draw(21, P, dtype=torch.bfloat16), draw(21, Q, dtype=torch.bfloat16, seed=1)
    strided = STRIDED[kind]
    assert not strided(left).is_contiguous()
    check(strided(left), right, some(P, Q, 200))
    check(strided(left), strided(right), some(P, Q, 200))


@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_to_add(tokens: int) -> None:
    index = some(P, Q, 0 if tokens else 5)
    check(draw(tokens, P), draw(tokens, Q), index)


def check_dots(left_TP: Tensor, right_TQ: Tensor, index: Tensor) -> None:
    width = right_TQ.shape[1]
    made = dots.make_dots(index // width, index % width, (left_TP.shape[1], width))
    assert dots.usable(left_TP, right_TQ)
    found = dots.dot_entries(left_TP, right_TQ, len(index), made)
    assert found.dtype == torch.float32
    close(found, oracle(left_TP, right_TQ, index))
    assert torch.equal(found, dots.dot_entries(left_TP, right_TQ, len(index), made))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_dots_of_types(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    check_dots(draw(70, 48, dtype=dtype), draw(70, 32, dtype=dtype, seed=1), some(48, 32, 150).to(index_dtype))


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "k"),
    [
        (1, 48, 32, 40),  # one token
        (64, 48, 32, 48 * 32),  # a whole block, all entries
        (3, 32, 48, 90),  # columns are the wider side
        (3, 300, 16, 90),  # two chunks, the second not full
        (3, 16, 530, 1),  # chunks without entries
        (2, 1200, 1100, 90),  # two parts of the narrower side, the second not full
        (2, 1200, 1100, 12),  # and parts without entries
        (2, 1, 1, 1),
    ],
)
def test_dots_of_sizes(tokens: int, rows: int, columns: int, k: int) -> None:
    left, right = draw(tokens, rows, dtype=torch.bfloat16), draw(tokens, columns, dtype=torch.bfloat16, seed=1)
    check_dots(left, right, some(rows, columns, k))


@pytest.mark.parametrize(
    "at", [[0], [48 * 32 - 1], [15 * 32 + 31, 16 * 32], list(range(32)), list(range(0, 48 * 32, 32))]
)
def test_dots_of_single_places_rows_and_columns(at: list[int]) -> None:
    left, right = draw(5, 48, dtype=torch.bfloat16), draw(5, 32, dtype=torch.bfloat16, seed=1)
    check_dots(left, right, torch.tensor(at, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("kind", STRIDED)
def test_dots_of_strides(kind: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        left, right = draw(5, 48, dtype=dtype), draw(5, 32, dtype=dtype, seed=1)
        check_dots(STRIDED[kind](left), STRIDED[kind](right), some(48, 32, 90))


def test_dots_of_odd_sides_and_places() -> None:
    index = some(35, 17, 90)
    left, right = draw(5, 36, dtype=torch.float16), draw(5, 17, dtype=torch.float16, seed=1)
    check_dots(left[:, 1:], right, index)
    check_dots(left[:, :35], right, index)


def test_dots_of_an_infinite_and_a_large_number() -> None:
    left, right = draw(5, 48, dtype=torch.bfloat16), draw(5, 32, dtype=torch.bfloat16, seed=1)
    left[2, 7], right[4, 3] = float("inf"), 1e30
    index = some(48, 32, 48 * 32)
    made = dots.make_dots(index // 32, index % 32, (48, 32))
    found = dots.dot_entries(left, right, len(index), made).view(48, 32).cpu()
    assert not found[7].isfinite().any()
    assert found[[row for row in range(48) if row != 7]].isfinite().all()


def test_dots_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, int]] = []
    launches = dots._launches
    monkeypatch.setattr(dots, "_launches", lambda *args: launched.extend(launches(*args)) or launches(*args))
    # One trip of 256 slots and one block of tokens takes 1 KiB.
    monkeypatch.setattr(dots, "PARTIALS", 2048)
    check_dots(draw(3, 1100), draw(3, 16, seed=1), some(1100, 16, 90))
    assert launched[:3] == [(0, 1), (1, 3), (3, 5)]


def test_dots_beyond_two_to_the_31() -> None:
    # Of 8 GiB, few are touched. Two numbers are loaded as one, so that 2^32 of them are 2^31.
    stride = 2**32 // 4 + 2
    base = torch.empty(4 * stride + 64, dtype=torch.bfloat16, device=DEVICE)
    left = base.as_strided((5, 48), (stride, 1))
    left.copy_(draw(5, 48, dtype=torch.bfloat16))
    check_dots(left, draw(5, 32, dtype=torch.bfloat16, seed=1), some(48, 32, 90))


@pytest.mark.parametrize("tokens", [0, 4])
def test_dots_of_nothing(tokens: int) -> None:
    check_dots(draw(tokens, 48), draw(tokens, 32), some(48, 32, 0 if tokens else 5))


@pytest.mark.parametrize(
    ("kind", "module", "name"), [("tiles", kernels, "tile_entries"), ("dots", dots, "dot_entries")]
)
def test_products_take_it(kind: Kind, module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, taken = some(48, 32, 90), []
    run = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: (taken.append(1), run(*args))[1])
    product = prepare(index, (48, 32), kind)
    left, right = draw(21, 48, dtype=torch.bfloat16), draw(21, 32, dtype=torch.bfloat16, seed=1)
    close(product.entries(left, right, index), oracle(left, right, index))
    assert taken == [1]
    # What the kernel cannot take goes the plain way.
    double = product.entries(left.double(), right.double(), index)
    torch.testing.assert_close(double.cpu(), oracle(left, right, index))
    assert taken == [1]


REFUSED: dict[str, tuple[Tensor, Tensor, str]] = {
    "float64": (torch.ones(3, 4).double(), torch.ones(3, 5).double(), "found torch.float64"),
    "two types": (torch.ones(3, 4).half(), torch.ones(3, 5), "two equal types"),
    "tokens": (torch.ones(3, 4), torch.ones(2, 5), r"expected \[T, P\] and \[T, Q\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    left, right, message = REFUSED[case]
    left, right = left.to(DEVICE), right.to(DEVICE)
    index = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    assert not kernels.usable(left, right)
    with pytest.raises(ValueError, match=message):
        kernels.tile_entries(left, right, index, kernels.make_tiles(index // 5, index % 5, 5))
    assert not dots.usable(left, right)
    with pytest.raises(ValueError, match=message):
        dots.dot_entries(left, right, 1, dots.make_dots(index // 5, index % 5, (4, 5)))


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_masks_that_crowd_and_scatter_on_a_gpu() -> None:
    index = torch.cat([torch.arange(64, device=DEVICE) + 4096 * row for row in range(0, 4096, 128)]).to(torch.int32)
    assert products.prepare(index, (4096, 4096)).kind in ("tiles", "dense")
    index = torch.arange(0, 4096 * 4096, 211, dtype=torch.int32, device=DEVICE)
    product = products.prepare(index, (4096, 4096))
    assert product.kind == "dots"
    left, right = draw(200, 4096, dtype=torch.bfloat16), draw(200, 4096, dtype=torch.bfloat16, seed=1)
    expected = (left.double().t() @ right.double()).view(-1)[index.long()]
    close(product.entries(left, right, index), expected.cpu())
