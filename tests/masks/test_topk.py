"""The k largest of slices over ranks, against a stable sort of the full array. Threads stand for the ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irdscale.errors import InputError
from irdscale.masks import topk
from irdscale.masks.topk import Chosen, Slice, largest
from tests.masks.test_mask import values


class Ranks:
    """What `irdscale.masks.topk` asks of the process group, for threads that all call it in the same order."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.local = threading.local()
        self.barrier = threading.Barrier(world, timeout=60)
        self.given: list[Any] = [None] * world

    def exchange(self, own: Any) -> list[Any]:
        self.given[self.local.rank] = own
        self.barrier.wait()
        everyones = list(self.given)
        self.barrier.wait()
        return everyones

    def rank_and_world(self) -> tuple[int, int]:
        return self.local.rank, self.world

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            total = torch.stack(self.exchange(tensor.clone())).sum(0)
            tensor.copy_(total)

    def gather_flat(self, tensor: Tensor, lengths: list[int]) -> Tensor:
        parts = self.exchange(tensor)
        assert [len(part) for part in parts] == lengths
        return torch.cat(parts)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.world

        def on(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = work(rank)
            except threading.BrokenBarrierError:
                pass
            except Exception as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=on, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results


class Alone:
    """`failing_together` for threads: a bad slice is tested for elsewhere."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def on_ranks(slices: list[dict[str, Slice]], k: int) -> list[dict[str, Chosen]]:
    ranks = Ranks(len(slices))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rank_and_world", "all_reduce_sum", "gather_flat"):
            patch.setattr(topk, name, getattr(ranks, name))
        patch.setattr(topk, "failing_together", Alone)
        return ranks.run(lambda rank: largest(slices[rank], k, shared=True))


def by_sorting(parts: list[Tensor], k: int) -> list[tuple[int, int]]:
    joined = torch.cat(parts)
    places = [(p, i) for p, part in enumerate(parts) for i in range(len(part))]
    return sorted(places[i] for i in joined.sort(descending=True, stable=True).indices[:k].tolist())


@st.composite
def cut_parameters(draw: Any) -> tuple[list[list[float]], list[list[int]], int]:
    """Parameters' entries, and where each is cut into one slice a rank, which may be empty."""
    world = draw(st.integers(1, 3))
    lists = draw(st.lists(st.lists(values, max_size=12), min_size=1, max_size=4))
    inside = [sorted(draw(st.lists(st.integers(0, len(x)), min_size=world - 1, max_size=world - 1))) for x in lists]
    return lists, [[0, *cuts, len(x)] for cuts, x in zip(inside, lists, strict=True)], world


@settings(max_examples=200, deadline=None)
@given(cut_parameters(), st.floats(0, 1), st.sampled_from([torch.float32, torch.float64]))
def test_slices_over_ranks_equal_a_stable_sort(
    parameters: tuple[list[list[float]], list[list[int]], int], share: float, dtype: torch.dtype
) -> None:
    lists, cuts, world = parameters
    parts = [torch.tensor(x, dtype=dtype) for x in lists]
    slices = [
        {f"p{p}": Slice(cut[rank], part[cut[rank] : cut[rank + 1]]) for p, (part, cut) in enumerate(zip(parts, cuts))}
        for rank in range(world)
    ]
    total = sum(map(len, lists))
    for k in {0, round(share * total), total}:
        expected = by_sorting(parts, k)
        for found in on_ranks(slices, k):
            assert [(int(n[1:]), i) for n, c in found.items() for i in c.index.tolist()] == expected
            for name, chosen in found.items():
                assert torch.equal(chosen.scores, parts[int(name[1:])][chosen.index])


def test_many_equal_entries_across_the_borders_of_ranks() -> None:
    torch.manual_seed(0)
    parts = [torch.randint(0, 4, (7001,)).float() / 2, torch.zeros(50), torch.randint(0, 4, (903,)).float() / 2]
    for world in (2, 3):
        shares = [-(-len(part) // world) for part in parts]
        slices = [
            {f"p{p}": Slice(min(r * n, len(x)), x[r * n : (r + 1) * n]) for p, (x, n) in enumerate(zip(parts, shares))}
            for r in range(world)
        ]
        for k in (1, 1999, 2345, 7930, 7954):
            for found in on_ranks(slices, k):
                assert [(int(n[1:]), i) for n, c in found.items() for i in c.index.tolist()] == by_sorting(parts, k)


def test_more_entries_than_32_bits_can_count() -> None:
    """Slices of a parameter of 2^33 entries, of which all that is not held here would be zero."""
    starts = [5, 2**31 - 2, 2**32 - 1, 2**33 - 4]
    scores = [torch.tensor([1.0, 0.5, 2.0, 0.5]) for _ in starts]
    slices = [{"wide": Slice(start, score)} for start, score in zip(starts, scores, strict=True)]
    best = [start + 2 for start in starts]
    for k, expected in ((4, best), (6, sorted([*best, 5, 2**31 - 2])), (8, sorted(best + starts))):
        for found in on_ranks(slices, k):
            assert found["wide"].index.tolist() == expected
            assert found["wide"].index.dtype == torch.int64
    # Ties at the threshold go to the lowest indices.
    for found in on_ranks(slices, 9):
        assert found["wide"].index.tolist() == sorted([*best, *starts, 6])


def test_an_unusable_entry_names_its_parameter() -> None:
    slices = [{"a": Slice(0, torch.ones(2))}, {"a": Slice(2, torch.tensor([float("nan")]))}]
    with pytest.raises(InputError, match="a: found NaN Fisher information"):
        on_ranks(slices, 1)
