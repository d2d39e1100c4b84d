"""Masks of every (samples, parameters) pair from one pass, against one Fisher accumulation each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale import Fisher, accumulate_fisher, top_k
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.accumulate import new_sums
from irdscale.fisher.lattice import equal_weights, quarters, rank_samples, ranked_entries_by_prefix
from irdscale.fisher.resume import SavedPass
from tests.models import collate, samples, tiny


@pytest.mark.parametrize("direction", ["ird", "reverse", "random"])
def test_every_mask_of_the_lattice_and_its_cost(direction: str) -> None:
    model, rows = tiny("bert"), samples(count=19)
    gradients = SampleGradients(model, rows, collate, scored_parameters(model), batch_size=4)
    traces = torch.zeros(len(rows), dtype=torch.float64)
    gradients.add_traces(range(len(rows)), traces)
    order = rank_samples(traces, direction, seed=7)
    sizes, k = [19, 9, 4, 2], 300
    rankings = ranked_entries_by_prefix(gradients, order, sizes, k, dtype=torch.float64)
    assert gradients.taken <= 2 * len(rows)
    assert sorted(rankings) == sorted(sizes)
    for s in sizes:
        chosen = [rows[i] for i in order[:s]]
        fisher = accumulate_fisher(model, chosen, collate_fn=collate, dtype=torch.float64)
        for p in (300, 150, 75, 1):
            assert rankings[s].prefix(p).hash == top_k(fisher, p).hash, (s, p)


def test_order_of_samples() -> None:
    traces = torch.tensor([2.0, 5.0, 1.0, 5.0], dtype=torch.float64)
    assert rank_samples(traces, "ird", 0) == [1, 3, 0, 2]
    assert rank_samples(traces, "reverse", 0) == [2, 0, 1, 3]
    shuffled = rank_samples(torch.zeros(50), "random", 1)
    assert sorted(shuffled) == list(range(50))
    assert shuffled == rank_samples(torch.ones(50), "random", 1)
    assert shuffled != rank_samples(torch.ones(50), "random", 2)


def slowly(values: list[float], direction: str, classes: list[int] | None, drop: int) -> list[int]:
    """The ranking one choice at a time: those that lead so far decide whose turn it is."""
    sign = -1 if direction == "ird" else 1
    best_first = sorted(range(len(values)), key=lambda i: (sign * values[i], i))
    by_size = best_first if direction == "ird" else best_first[::-1]
    left, order = [i for i in best_first if i not in by_size[:drop]], []
    while left:
        taken = [0 if classes is None else sum(classes[j] == classes[i] for j in order) for i in left]
        order.append(left.pop(taken.index(min(taken))))
    return order + [i for i in best_first if i in by_size[:drop]]


@pytest.mark.parametrize("direction", ["ird", "reverse"])
@pytest.mark.parametrize("drop", [0, 7])
@pytest.mark.parametrize("balanced", [False, True])
def test_order_with_turns_and_without_the_top(direction: str, drop: int, balanced: bool) -> None:
    generator = torch.Generator().manual_seed(drop)
    # Few values, so that there are ties, and a class that ends early.
    values = torch.randint(0, 9, (30,), generator=generator).double()
    classes = [2 if i in (3, 11) else i % 2 for i in range(30)] if balanced else None
    order = rank_samples(values, direction, 0, classes=classes, drop_top=drop / 30)
    assert order == slowly(values.tolist(), direction, classes, drop)
    assert sorted(order) == list(range(30))
    top = sorted(values.tolist())[-7:]
    assert drop == 0 or sorted(values[order[-7:]].tolist()) == top
    if classes is not None:
        lasting = 2 * min([classes[i] for i in order[: 30 - drop]].count(c) for c in (0, 1))
        assert lasting >= 18
        for size in range(1, lasting):
            counts = [[classes[i] for i in order[:size]].count(c) for c in (0, 1)]
            assert abs(counts[0] - counts[1]) <= 1
    assert drop or balanced or order == rank_samples(values, direction, 0)


def test_largest_never_are_in_the_half_that_is_kept() -> None:
    for count in range(1, 40):
        values = torch.arange(count).double()
        order = rank_samples(values, "ird", 0, drop_top=0.49)
        dropped = round(0.49 * count)
        assert not set(order[: count // 2]) & set(range(count - dropped, count)), count


def test_quarters_of_labels() -> None:
    assert quarters([5.0, 1.0, 1.0, 4.0, 3.0, 1.0, 0.0, 9.0]) == [3, 0, 1, 2, 2, 1, 0, 3]
    assert quarters([1.0, 0.0]) == [2, 0]


def test_random_shuffle_gives_traces_in_the_accumulation_pass() -> None:
    model, rows = tiny("bert"), samples()
    gradients = SampleGradients(model, rows, collate, scored_parameters(model))
    traces = torch.zeros(len(rows), dtype=torch.float64)
    ranked_entries_by_prefix(gradients, rank_samples(traces, "random", 0), [8, 4], 5, traces=traces)
    assert gradients.taken == len(rows)
    torch.testing.assert_close(traces, accumulate_fisher(model, rows, collate_fn=collate).sample_trace)


@pytest.mark.parametrize("objective", ["label", "expected"])
def test_equal_samples_are_each_divided_by_their_own_trace(objective: Any) -> None:
    """Against one backward pass a sample, each square divided by its sum; a sample without a trace adds nothing."""
    model, rows = tiny("bert", "regression"), samples("regression", count=6)
    gradients = SampleGradients(model, rows, collate, scored_parameters(model), batch_size=4, objective=objective)
    traces = torch.zeros(6, dtype=torch.float64)
    gradients.add_traces(range(6), traces)
    traces[3] = 0
    weights = equal_weights(traces)
    order, sizes = [4, 3, 1, 0, 5, 2], [6, 3, 1]
    found = ranked_entries_by_prefix(gradients, order, sizes, 300, weights=weights, dtype=torch.float64)
    sums = new_sums(gradients, order, dtype=torch.float64)
    gradients.accumulate(order, sums, weights=weights)
    unit = []
    for row in rows:
        # The squared gradient of a squared error is a constant times that of the prediction, which cancels.
        model.zero_grad()
        model(**{k: v for k, v in collate([row]).items() if k != "labels"}).logits.sum().backward()
        squares = {n: torch.zeros_like(p) if p.grad is None else p.grad**2 for n, p in model.named_parameters()}
        total = sum(square.sum() for square in squares.values())
        unit.append({n: square / total * (row is not rows[3]) for n, square in squares.items()})
    model.zero_grad()
    for name, total in sums.tensors.items():
        torch.testing.assert_close(total, sum(one[name] for one in unit), rtol=1e-9, atol=1e-15)
    for size in sizes:
        expected = {name: sum(unit[i][name] for i in order[:size]) for name in unit[0]}
        wanted = top_k(Fisher(expected, torch.zeros(0, dtype=torch.float64)), 300)
        assert found[size].prefix(300).hash == wanted.hash
    plain = ranked_entries_by_prefix(gradients, order, sizes, 300, dtype=torch.float64)
    assert plain[6].prefix(300).hash != found[6].prefix(300).hash


def test_a_pass_goes_on_only_with_the_weights_that_it_began_with(tmp_path: Path) -> None:
    model, rows = tiny("bert"), samples()

    def run(weights: Any, collate_fn: Any = collate, saved: Any = None) -> Any:
        gradients = SampleGradients(model, rows, collate_fn, scored_parameters(model), batch_size=1)
        rankings = ranked_entries_by_prefix(gradients, range(8), [8, 3], 300, weights=weights, saved=saved)
        return rankings[8].prefix(300).hash

    asked = 0

    def counting(batch: Any) -> Any:
        nonlocal asked
        asked += 1
        return collate(batch)

    run(torch.ones(8, dtype=torch.float64), counting, SavedPass(tmp_path / "whole", 60))
    # All that is looked at first, and five of the eight batches: the state is saved after three.
    left = asked - 8 + 5

    def stopping(batch: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return collate(batch)

    first, other = torch.ones(8, dtype=torch.float64), torch.tensor([1e3] + [1.0] * 7, dtype=torch.float64)
    with pytest.raises(KeyboardInterrupt):
        run(first, stopping, SavedPass(tmp_path, 0))
    assert (tmp_path / "state.json").exists()
    assert run(other, saved=SavedPass(tmp_path, 60)) == run(other) != run(first)
