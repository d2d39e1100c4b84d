"""Every way to the entries of a product against the product itself, in float64, and the choice among them."""

from __future__ import annotations

from itertools import product as pairs

import pytest
import torch
from torch import Tensor

from irdscale.sparse import products
from irdscale.sparse.products import CPU, GPU, DotRates, Kind, Rates, choose, cost, prepare

KINDS: tuple[Kind, ...] = ("dense", "sampled", "tiles", "dots")
T = 7


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(left_TP: Tensor, right_TQ: Tensor, index: Tensor) -> Tensor:
    """Entry by entry."""
    width = right_TQ.shape[1]
    return torch.stack([(left_TP[:, i // width] * right_TQ[:, i % width]).sum() for i in index.tolist()])


INDICES: dict[str, tuple[tuple[int, int], list[int]]] = {
    "one entry": ((5, 6), [13]),
    "first and last": ((5, 6), [0, 29]),
    "all": ((5, 6), list(range(30))),
    "one row": ((5, 6), [12, 14, 17]),
    "one column": ((5, 6), [3, 9, 27]),
    "all rows, some columns": ((3, 7), [1, 8, 15, 18]),
    "all columns, some rows": ((7, 3), [3, 4, 5, 18]),
    "scattered": ((40, 30), [5, 77, 78, 401, 640, 1199]),
    "a single row": ((1, 6), [1, 4]),
    "a single column": ((6, 1), [1, 4]),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INDICES)
def test_entries(name: str, kind: Kind, dtype: torch.dtype) -> None:
    shape, at = INDICES[name]
    index = torch.tensor(at, dtype=dtype)
    left, right = draw(T, shape[0]), draw(T, shape[1], seed=1)
    product = prepare(index, shape, kind)
    assert product.kind == kind
    torch.testing.assert_close(product.entries(left, right, index), oracle(left, right, index), rtol=1e-12, atol=1e-12)
    strided = draw(T, 2 * shape[0])[:, ::2]
    torch.testing.assert_close(
        product.entries(strided, right, index), oracle(strided, right, index), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("taken", pairs((False, True), repeat=2))
@pytest.mark.parametrize("kind", ["dense", "sampled"])
def test_taken_rows_and_columns(kind: Kind, taken: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "choose", lambda *_: (kind, taken))
    shape, at = INDICES["scattered"]
    index = torch.tensor(at, dtype=torch.int32)
    product = prepare(index, shape)
    assert (product.rows.taken is not None, product.columns.taken is not None) == taken
    left, right = draw(T, shape[0]), draw(T, shape[1], seed=1)
    torch.testing.assert_close(product.entries(left, right, index), oracle(left, right, index), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 31, 32, 511, 512, 520, 1024, 1027])
def test_tokens_in_parts(tokens: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    index = torch.tensor([3, 7, 8, 19], dtype=torch.int32)
    left, right = draw(tokens, 4), draw(tokens, 5, seed=1)
    found = prepare(index, (4, 5), "sampled").entries(left, right, index)
    torch.testing.assert_close(found, oracle(left, right, index), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (33, 65), (128, 64), (342, 257)])
def test_transposed(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype)
    for strided in (x, draw(*reversed(shape), dtype=dtype).t(), x.repeat_interleave(2, 1)[:, ::2], x[:1].expand(shape)):
        found = products.transposed(strided)
        assert found.is_contiguous()
        assert torch.equal(found, strided.t()[None])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_transposed_in_parts(count: int) -> None:
    x = draw(count * 5, 7)
    found = products.transposed(x, count)
    assert found.is_contiguous()
    assert torch.equal(found, x.view(count, 5, 7).transpose(1, 2))


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("tokens", [0, 1, 31, 63, 64, 127, 128, 512, 520, 1024, 1027, 4096, 5000])
def test_parts_cover_all_tokens_once(tokens: int, threads: int) -> None:
    parts = products._parts(tokens, threads)
    covered = [t for start, count, length in parts for t in range(start, start + count * length)]
    assert covered == list(range(tokens))
    assert all(0 < length <= 512 and count <= threads for _, count, length in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: Kind) -> None:
    index = torch.tensor([3, 7])
    product = prepare(index, (4, 5), kind)
    assert torch.equal(product.entries(draw(0, 4), draw(0, 5), index), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: Kind) -> None:
    index = torch.tensor([3, 7, 12])
    left, right = draw(T, 4, dtype=torch.bfloat16), draw(T, 5, seed=1, dtype=torch.bfloat16)
    found = prepare(index, (4, 5), kind).entries(left, right, index)
    rtol = 1e-6 if kind == "sampled" else 1e-2
    expected = oracle(left.double(), right.double(), index)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", ["dense", "sampled"])
def test_what_is_kept_is_one_place_an_entry(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "choose", lambda *_: (kind, (True, True)))
    index = torch.arange(0, 60 * 50, 2, dtype=torch.int32)
    kept = sum(t.nbytes for t in prepare(index, (60, 50)).tensors())
    assert kept <= 4 * (len(index) + 60 + 50 + 60 + 1)


def test_what_dots_keep() -> None:
    index = torch.randperm(512 * 300, generator=torch.Generator().manual_seed(0))[:2000].sort().values.to(torch.int32)
    tensors = prepare(index, (512, 300), "dots").tensors()
    assert {t.dtype for t in tensors} == {torch.int32}
    # All groups of 16 rows in a chunk of 256 get as many slots, by sixteens, as the one with most entries.
    most = torch.bincount(index // 300 // 16).view(2, 16).amax(1)
    slots = sum(16 * 16 * -(-entries // 16) for entries in most.tolist())
    assert sum(t.nbytes for t in tensors) == 4 * (2 * slots + 3)
    assert slots < 1.5 * len(index)


def test_whole_dense_products_keep_nothing() -> None:
    assert prepare(torch.arange(60 * 50, dtype=torch.int32), (60, 50), "dense").tensors() == []


def test_cost_counts_what_is_done() -> None:
    dots = DotRates(entry=7, row=11, copy=17, launch=19)
    rates = Rates(take=2, transpose=3, read=3, sampled=5, tile=23, dots=dots)
    shape, active = (10, 20), (4, 5)
    assert cost("dense", shape, active, (False, False), 6, rates) == 10 * 20
    assert cost("dense", shape, active, (True, False), 6, rates) == 2 * 4 + 4 * 20
    assert cost("dense", shape, active, (False, True), 6, rates) == 2 * 5 + 10 * 5
    # Reading few rows and columns takes longer than multiplying them.
    assert cost("dense", shape, active, (True, True), 6, rates) == 2 * (4 + 5) + 3 * (4 + 5)
    assert cost("sampled", shape, active, (False, False), 6, rates) == 3 * (10 + 20) + 5 * 6
    assert cost("sampled", shape, active, (True, False), 6, rates) == 2 * 4 + 3 * (4 + 20) + 5 * 6
    assert cost("sampled", shape, active, (True, True), 6, rates) == 2 * 9 + 3 * 9 + 5 * 6
    assert cost("tiles", shape, active, (False, False), 6, rates, 3) == 23 * 3 * 64 * 64
    few = Rates(take=2, tile=23, tiles=8)
    assert cost("tiles", shape, active, (False, False), 6, few, 3) == 23 * 8 * 64 * 64
    rates = Rates(take=2, read=13, dots=dots)
    for k, inner in ((6, 13 * 30), (60, 7 * 60 + 11 * 20)):
        assert cost("dots", shape, active, (False, False), k, rates) == inner + 17 * 10 + 19
    # Two parts of the narrower side: the wider one is loaded for each.
    assert cost("dots", (2048, 9), active, (False, False), 10**6, rates) == 7 * 10**6 + 11 * 2048 + 17 * 9 + 19
    assert cost("dots", (1025, 9000), active, (False, False), 10**6, rates) == 7 * 10**6 + 22 * 9000 + 17 * 1025 + 19


@pytest.mark.parametrize("rates", [CPU, GPU])
def test_choice(rates: Rates) -> None:
    assert choose((4096, 4096), (20, 30), 300, rates, 99) == ("dense", (True, True))
    assert choose((512, 512), (512, 512), 512 * 512, rates, 64) == ("dense", (False, False))
    assert choose((512, 512), (512, 3), 600, rates, 8)[1] == (False, True)
    scattered = choose((512, 512), (480, 480), 1310, rates, 64)
    assert scattered == (("sampled", (False, False)) if rates is CPU else ("dense", (False, False)))


@pytest.mark.parametrize("share", [0.0005, 0.002, 0.005])
@pytest.mark.parametrize("shape", [(2048, 2048), (8192, 2048), (2048, 8192), (14336, 4096)])
def test_scattered_entries_of_large_matrices_go_by_dots_on_a_gpu(shape: tuple[int, int], share: float) -> None:
    tiles = shape[0] * shape[1] // 64**2
    assert choose(shape, shape, int(share * shape[0] * shape[1]), GPU, tiles) == ("dots", (False, False))


def test_dots_lose_to_dense_where_entries_are_many() -> None:
    shape = (8192, 2048)
    assert GPU.dots is not None
    fixed = GPU.dots.row * 8192 * 2 + GPU.dots.copy * 2048 + GPU.dots.launch
    border = int((8192 * 2048 - fixed) / GPU.dots.entry)
    for k, kind in ((border, "dots"), (border + 1, "dense")):
        assert choose(shape, shape, k, GPU, 4096) == (kind, (False, False))


def test_tiles_win_where_few_hold_entries() -> None:
    assert GPU.tile is not None
    shape, k = (4096, 4096), 10**6
    border = int(4096 * 4096 / (GPU.tile * 64 * 64))
    for tiles, kind in ((border, "tiles"), (border + 1, "dense")):
        assert choose(shape, shape, k, GPU, tiles) == (kind, (False, False))


def test_a_mask_is_prepared_with_few_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []

    def count(name: str) -> None:
        run = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *args, **more: (waits.append(name), run(self, *args, **more))[1])

    for name in ("tolist", "item", "nonzero", "unique", "unique_consecutive", "__bool__", "__int__", "__float__"):
        count(name)
    # Cheap enough to win on a small matrix.
    cheap = DotRates(entry=0, row=0, copy=0, launch=0)
    monkeypatch.setattr(products, "CPU", Rates(take=1, tile=1, dots=cheap))
    index = torch.tensor([5, 77, 78, 401, 640, 1199], dtype=torch.int32)
    assert prepare(index, (40, 30)).kind == "dots"
    assert waits == ["tolist", "tolist"]
    waits.clear()
    assert prepare(index, (40, 30), "dense").kind == "dense"
    assert waits == ["tolist"]


def test_choice_turns_where_the_costs_cross() -> None:
    shape, active = (512, 512), (512, 512)
    # 16 (512 + 512) + 7 k = 512 * 512
    border = (512 * 512 - 16 * 1024) // 7
    assert choose(shape, active, border, CPU)[0] == "sampled"
    assert choose(shape, active, border + 1, CPU)[0] == "dense"
    # 24 R + 512 R = 512 * 512: taking rows pays below.
    rows = 512 * 512 // 536
    assert choose(shape, (rows, 512), 10**6, CPU) == ("dense", (True, False))
    assert choose(shape, (rows + 1, 512), 10**6, CPU) == ("dense", (False, False))


@pytest.mark.parametrize("off", [0, 1])
def test_both_sides_of_the_border_are_exact(off: int) -> None:
    shape = (128, 128)
    border = (128 * 128 - 16 * 256) // 7
    index = torch.randperm(128 * 128, generator=torch.Generator().manual_seed(0))[: border + off].sort().values
    left, right = draw(T, 128), draw(T, 128, seed=1)
    product = prepare(index, shape)
    assert product.kind == ("dense" if off else "sampled")
    torch.testing.assert_close(product.entries(left, right, index), oracle(left, right, index), rtol=1e-12, atol=1e-12)
