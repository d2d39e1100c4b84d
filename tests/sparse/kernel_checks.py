"""The Triton kernel against a float64 oracle, on the GPU or in Triton's interpreter.

Run by test_kernels.py in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from irdscale.sparse import kernels, products
from irdscale.sparse.kernels import TILE
from irdscale.sparse.products import prepare
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
    assert len(tiles.tiles) == kernels.count_tiles(index // width, index % width, width)
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


def test_every_block_of_the_gpu() -> None:
    index = some(P, Q, 500)
    tiles = kernels.make_tiles(index // Q, index % Q, Q)
    for dtype, blocks in ((torch.bfloat16, kernels.HALF_BLOCKS), (torch.float32, kernels.FLOAT_BLOCKS)):
        left, right = draw(150, P, dtype=dtype), draw(150, Q, dtype=dtype, seed=1)
        for block in blocks:
            close(kernels._entries((block,), left, right, index, tiles), oracle(left, right, index))


def test_products_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    index, taken = some(P, Q, 200), []
    run = kernels.tile_entries
    monkeypatch.setattr(kernels, "tile_entries", lambda *args: (taken.append(1), run(*args))[1])
    product = prepare(index, (P, Q), "tiles")
    left, right = draw(21, P, dtype=torch.bfloat16), draw(21, Q, dtype=torch.bfloat16, seed=1)
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


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_concentrated_mask_on_a_gpu_takes_it() -> None:
    index = torch.cat([torch.arange(64, device=DEVICE) + 4096 * row for row in range(0, 4096, 128)]).to(torch.int32)
    assert products.prepare(index, (4096, 4096)).kind in ("tiles", "dense")
