"""The search algorithm on synthetic score functions."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irdscale.config import SearchConfig
from irdscale.errors import RunError
from irdscale.search.ird import (
    HALVES,
    Outcome,
    Pair,
    Shrink,
    best_of,
    candidates,
    close_calls,
    further_seeds,
    ird,
    lattice,
    most_evaluations,
    most_rounds,
    sample_sets,
    shrink_of,
    told_apart,
)

SIZES = st.integers(1, 300)
KEEPS = st.sampled_from([0.3, 0.5, 0.7, 0.9])
SEEDS = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)


class Scores:
    """A synthetic landscape that counts what it was asked."""

    def __init__(self, score: object, failing: set[tuple[Pair, int]] | None = None) -> None:
        self.score, self.failing = score, failing or set()
        self.asked: Counter[tuple[Pair, int]] = Counter()
        self.rounds: list[tuple[int, list[tuple[Pair, int]]]] = []

    def __call__(self, round_number: int, wanted: list[tuple[Pair, int]]) -> list[float | None]:
        self.asked.update(wanted)
        self.rounds.append((round_number, wanted))
        return [None if w in self.failing else self.score(*w) for w in wanted]  # type: ignore[operator]


def run(
    scores: Scores,
    start: Pair,
    minimum: Pair,
    seeds: list[int],
    max_rounds: int = 50,
    patience: int = 50,
    shrink: Shrink = HALVES,
) -> Outcome:
    return ird(start, minimum, seeds, max_rounds, patience, scores, shrink=shrink)


@settings(max_examples=200, deadline=None)
@given(st.data(), SIZES, SIZES, SIZES, SIZES, SEEDS, st.integers(1, 12), st.integers(1, 4), KEEPS)
def test_invariants_on_any_landscape(
    data: st.DataObject, s: int, p: int, s0: int, p0: int, seeds: list[int], max_rounds: int, patience: int, keep: float
) -> None:
    start, minimum = Pair(max(s, s0), max(p, p0)), Pair(min(s, s0), min(p, p0))
    shrink = Shrink(keep, reach=max_rounds)
    table: dict[tuple[Pair, int], float | None] = {}

    def score(pair: Pair, seed: int) -> float | None:
        if (pair, seed) not in table:
            table[pair, seed] = data.draw(st.one_of(st.floats(-1, 1), st.none()) if pair != start else st.floats(-1, 1))
        return table[pair, seed]

    scores = Scores(score)
    outcome = run(scores, start, minimum, seeds, max_rounds, patience, shrink)
    assert set(scores.asked.values()) == {1}, "never evaluated twice"
    assert outcome.evaluations == len(scores.asked)
    reachable_s, reachable_p = lattice(start, minimum, shrink)
    assert len(outcome.path) - 1 <= most_rounds(start, minimum, max_rounds, shrink)
    for pair, _ in scores.asked:
        assert pair.samples in reachable_s
        assert pair.params in reachable_p
        assert pair.samples >= minimum.samples
        assert pair.params >= minimum.params
    assert [number for number, _ in scores.rounds] == sorted({number for number, _ in scores.rounds})
    assert len(outcome.path) <= max_rounds + 1
    for earlier, later in zip(outcome.path, outcome.path[1:], strict=False):
        moved = candidates(earlier.pair, minimum, shrink)
        assert later.pair in moved
        alive = {pair: outcome.means[pair] for pair in moved if pair in outcome.means}
        assert later.pair == best_of(alive)
        assert later.mean == outcome.means[later.pair]
    assert outcome.mean == max(outcome.means.values()) == outcome.means[outcome.best]
    assert all(table[pair, seed] is not None for pair in outcome.means for seed in seeds), "failures have no mean"
    for pair, mean in outcome.means.items():
        assert mean == sum(table[pair, seed] for seed in seeds) / len(seeds)  # type: ignore[misc]
        front = next(q for q in outcome.pareto if q.params == pair.params)
        assert outcome.means[front] >= mean
    assert [q.params for q in outcome.pareto] == sorted({q.params for q in outcome.means}, reverse=True)


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 5), SEEDS)
def test_finds_the_planted_best_of_a_monotone_landscape(i: int, j: int, seeds: list[int]) -> None:
    """The nearer to the planted pair in halvings, the better: greedy descent must arrive there."""
    start, minimum = Pair(320, 640), Pair(5, 10)
    reachable_s, reachable_p = lattice(start, minimum)
    planted = Pair(reachable_s[i], reachable_p[j])

    def score(pair: Pair, seed: int) -> float:
        return -abs(reachable_s.index(pair.samples) - i) - abs(reachable_p.index(pair.params) - j) + 0.01 * seed

    outcome = run(Scores(score), start, minimum, seeds)
    assert outcome.best == planted
    assert planted in [step.pair for step in outcome.path]


def test_rounds_in_order() -> None:
    scores = Scores(lambda pair, seed: float(pair.samples - pair.params))
    outcome = run(scores, Pair(8, 8), Pair(4, 2), [0, 1], max_rounds=2)
    assert scores.rounds[0] == (0, [(Pair(8, 8), 0), (Pair(8, 8), 1)])
    assert [pair for pair, seed in scores.rounds[1][1] if seed == 0] == [Pair(4, 8), Pair(8, 4), Pair(4, 4)]
    assert [pair for pair, seed in scores.rounds[2][1] if seed == 0] == [Pair(8, 2), Pair(4, 2)], "(4, 4) is known"
    assert [step.pair for step in outcome.path] == [Pair(8, 8), Pair(8, 4), Pair(8, 2)]
    assert outcome.stop == "max_rounds = 2 reached"


def test_patience_counts_rounds_without_a_new_best() -> None:
    scores = Scores(lambda pair, seed: float(pair.samples))
    outcome = run(scores, Pair(64, 64), Pair(1, 1), [0], patience=2)
    assert outcome.best == Pair(64, 1), "fewer parameters win a tie, and a tie won is a new best"
    falling = Scores(lambda pair, seed: float(pair.samples * pair.params))
    outcome = run(falling, Pair(64, 64), Pair(1, 1), [0], patience=2)
    assert outcome.best == Pair(64, 64)
    assert len(outcome.path) == 3
    assert outcome.stop == "no new best for patience = 2 rounds"


def test_failures() -> None:
    start = Pair(8, 8)
    lame = {(Pair(4, 8), 1), (Pair(8, 4), 0)}
    outcome = run(Scores(lambda pair, seed: 1.0 - pair.params / 100, lame), start, Pair(4, 4), [0, 1])
    assert [step.pair for step in outcome.path] == [start, Pair(4, 4)]
    dead = lame | {(Pair(4, 4), 0)}
    outcome = run(Scores(lambda pair, seed: 0.0, dead), start, Pair(4, 4), [0, 1])
    assert outcome.stop == "every candidate of round 1 failed"
    assert outcome.best == start
    with pytest.raises(RunError, match="the start, 8 samples and 8 parameters, could not be evaluated"):
        run(Scores(lambda pair, seed: 0.0, {(start, 0)}), start, Pair(4, 4), [0, 1])


def test_bad_sizes() -> None:
    for start, minimum in ((Pair(4, 4), Pair(0, 1)), (Pair(4, 4), Pair(5, 1)), (Pair(4, 4), Pair(1, 5))):
        with pytest.raises(ValueError, match="found"):
            run(Scores(lambda pair, seed: 0.0), start, minimum, [0])


def test_odd_sizes_and_minima() -> None:
    assert candidates(Pair(7, 5), Pair(3, 2)) == [Pair(3, 5), Pair(7, 2), Pair(3, 2)]
    assert candidates(Pair(7, 5), Pair(4, 2)) == [Pair(7, 2)]
    assert candidates(Pair(7, 5), Pair(4, 3)) == []
    assert lattice(Pair(7, 5), Pair(1, 2)) == ([7, 3, 1], [5, 2])


def test_both_halves() -> None:
    assert candidates(Pair(7, 5, 2), Pair(3, 2), Shrink(both=True)) == [
        Pair(3, 5, 2),
        Pair(3, 5, 6),
        Pair(7, 2, 2),
        Pair(3, 2, 2),
        Pair(3, 2, 6),
    ]
    assert best_of({Pair(4, 4, 4): 1.0, Pair(4, 4): 1.0}) == Pair(4, 4)
    start, minimum = Pair(16, 8), Pair(2, 4)
    # The planted set is reached by taking the later half, the earlier one, and the later one again.
    planted = Pair(2, 8, 10)

    def score(pair: Pair, seed: int) -> float:
        shared = len(set(range(pair.begin, pair.begin + pair.samples)) & {10, 11})
        return shared / pair.samples + pair.params / 1000

    outcome = ird(start, minimum, [0], 9, 9, Scores(score), shrink=Shrink(both=True))
    assert outcome.best == planted
    assert [step.pair.begin for step in outcome.path[:4]] == [0, 8, 8, 10]
    assert ird(start, minimum, [0], 9, 9, Scores(score)).best == start


@settings(deadline=None)
@given(SIZES, SIZES, KEEPS, st.sampled_from([None, 0, 1, 3, 5]))
def test_sample_sets_hold_every_set_that_a_search_can_reach(
    samples: int, least: int, keep: float, reach: int | None
) -> None:
    least = min(samples, least)
    for both in (False, True):
        shrink = Shrink(keep, both, reach)
        level = {Pair(samples, 1)}
        reached, rounds = set(level), 0
        while level and rounds != reach:
            level = {part for pair in level for part in candidates(pair, Pair(least, 1), shrink)}
            reached, rounds = reached | level, rounds + 1
        sets = sample_sets(samples, least, shrink)
        assert sets[0][1] == lattice(Pair(samples, 1), Pair(least, 1), shrink)[0]
        listed = [(begin, size) for begin, sizes in sets for size in sizes]
        assert len(listed) == len(set(listed))
        assert set(listed) == {(pair.begin, pair.samples) for pair in reached}
        assert len({begin for begin, _ in sets}) == len(sets)
        assert all(begin + sizes[0] <= samples for begin, sizes in sets)
        assert all(sizes == sorted(sizes, reverse=True) for _, sizes in sets)
        halvings = len(sets[0][1]) - 1
        if keep == 0.5:
            assert sum(sizes[0] for _, sizes in sets) <= samples * (1 + both * halvings / 2)


@given(st.integers(1, 10**12), st.integers(1, 99))
def test_what_is_kept_is_rounded_down_exactly(value: int, percent: int) -> None:
    for whole in (value, 100 * value):
        assert Shrink(percent / 100).kept(whole) == whole * percent // 100 < whole
    assert HALVES.kept(value) == value // 2


def test_other_shares_than_halves() -> None:
    assert Shrink(0.7).kept(10) == 7
    assert Shrink(0.29).kept(100) == 29, "which floats take for 28"
    assert Shrink(0.9).kept(1) == 0
    shrink = Shrink(0.7)
    assert candidates(Pair(10, 20), Pair(1, 1), shrink) == [Pair(7, 20), Pair(10, 14), Pair(7, 14)]
    assert lattice(Pair(10, 20), Pair(4, 10), shrink) == ([10, 7, 4], [20, 14])
    assert most_rounds(Pair(10, 20), Pair(4, 10), 9, shrink) == 3
    later = candidates(Pair(10, 20, 5), Pair(1, 15), Shrink(0.7, both=True))
    assert later == [Pair(7, 20, 5), Pair(7, 20, 8)], "the two overlap"
    outcome = run(Scores(lambda pair, seed: 0.0), Pair(10, 20), Pair(10, 20), [0], shrink=shrink)
    assert outcome.stop == "no share of 0.7 of 10 samples or 20 parameters is above the minima"
    outcome = run(Scores(lambda pair, seed: 0.0), Pair(10, 20), Pair(10, 20), [0])
    assert outcome.stop == "no half of 10 samples or 20 parameters is above the minima"


def test_what_a_configuration_shrinks_by() -> None:
    assert shrink_of(SearchConfig()) == HALVES
    assert shrink_of(SearchConfig(direction="both")) == Shrink(both=True)
    assert shrink_of(SearchConfig(keep=0.3)) == Shrink(0.3)
    fine = shrink_of(SearchConfig(keep=0.95, max_rounds=4))
    assert fine == Shrink(0.95, reach=4)
    assert len(lattice(Pair(1024, 10**6), Pair(8, 10), fine)[0]) == 5, "not the hundred that there are"


def race(field: list[Pair], table: Callable[[Pair, int], float | None], order: list[int], count: int) -> Pair | None:
    """The winner of a field by successive halving, from a table of all metrics; larger is better."""
    left = [pair for pair in field if None not in [table(pair, seed) for seed in order[:count]]]
    if not left:
        return None

    def mean(pair: Pair) -> float:
        return np.mean([table(pair, seed) for seed in order[:count]])  # type: ignore[arg-type,return-value]

    entered = len(field)
    while True:
        left.sort(key=lambda pair: (-mean(pair), pair.params, pair.samples, pair.begin))
        first = left[0]
        rivals = []
        for pair in left[1:]:
            apart = np.array([table(first, seed) - table(pair, seed) for seed in order[:count]])  # type: ignore[operator]
            clear = len(apart) > 1 and (
                not apart.any() or abs(apart.mean()) > 2 * apart.std(ddof=1) / np.sqrt(len(apart))
            )
            rivals += [] if clear else [pair]
        left = [first, *rivals][: max(2, -(-entered // 2))]
        if len(left) == 1 or count == len(order):
            return first
        entered, count = len(left), min(2 * count, len(order))
        left = [pair for pair in left if None not in [table(pair, seed) for seed in order[:count]]]
        if not left:
            return first


@settings(max_examples=300, deadline=None)
@given(st.data(), SEEDS, st.integers(0, 9), st.booleans(), st.integers(1, 4), st.booleans())
def test_close_calls_are_raced(
    data: st.DataObject, seeds: list[int], more: int, both: bool, max_rounds: int, failing: bool
) -> None:
    """The path and the best are those of a race over tables of all metrics; no seed is used out of turn or twice."""
    start, minimum, shrink = Pair(16, 16), Pair(2, 4), Shrink(both=both)
    order = [*seeds, *further_seeds(seeds, more)]
    values = st.integers(-3, 3).map(float)
    table: dict[tuple[Pair, int], float | None] = {}

    def metric(pair: Pair, seed: int) -> float | None:
        if (pair, seed) not in table:
            may_fail = failing and pair != start
            table[pair, seed] = data.draw(st.one_of(values, st.none()) if may_fail else values)
        return table[pair, seed]

    scores = Scores(metric)
    outcome = ird(start, minimum, seeds, max_rounds, 9, scores, shrink=shrink, more=order[len(seeds) :])
    assert set(scores.asked.values()) == {1}
    used: dict[Pair, list[int]] = {}
    for pair, seed in scores.asked:
        used.setdefault(pair, []).append(seed)
    assert all(of_one == order[: len(of_one)] for of_one in used.values())
    assert outcome.evaluations == len(scores.asked)
    most = most_evaluations(start, minimum, max_rounds, len(seeds), shrink, more) - 2 * len(seeds)
    assert outcome.evaluations <= most
    state, best = start, start
    for step in outcome.path[1:]:
        state = race(candidates(state, minimum, shrink), metric, order, len(seeds))  # type: ignore[assignment]
        assert step.pair == state
        best = race([best, state], metric, order, len(seeds)) or best
    assert outcome.best == best
    assert best in outcome.pareto
    for pair, mean in outcome.means.items():
        assert mean == sum(table[pair, seed] for seed in seeds) / len(seeds)  # type: ignore[misc]


def test_more_seeds_find_what_the_first_one_hides() -> None:
    start, good = Pair(16, 16), Pair(8, 8)
    first = {start: 0.9, Pair(8, 16): 0.8, good: 0.7, Pair(16, 8): 0.1}

    def metric(pair: Pair, seed: int) -> float:
        return float(pair == good) if seed else first[pair]

    for more, expected, asked in ((0, start, 4), (3, good, 1 + 3 + 2 * 1 + 2 * 2 + 3)):
        scores = Scores(metric)
        outcome = ird(start, good, [0], 1, 1, scores, more=further_seeds([0], more))
        assert outcome.best == expected
        assert outcome.evaluations == asked
        assert outcome.mean == first[expected], "over the first seeds, by which all pairs are told"
    rounds = [(number, {pair for pair, _ in wanted}, {seed for _, seed in wanted}) for number, wanted in scores.rounds]
    assert rounds == [
        (0, {start}, {0}),
        (1, {Pair(8, 16), Pair(16, 8), good}, {0}),
        (1, {Pair(8, 16), good}, {1}),
        (1, {Pair(8, 16), good}, {2, 3}),
        (1, {start}, {1}),
        (1, {start}, {2, 3}),
    ]


def test_what_is_told_apart_takes_no_further_seed() -> None:
    scores = Scores(lambda pair, seed: -pair.samples * pair.params + 0.001 * seed * pair.samples)
    ird(Pair(64, 64), Pair(1, 1), [0, 1], 9, 9, scores, more=[2, 3])
    assert {seed for _, seed in scores.asked} == {0, 1}
    same = Scores(lambda pair, seed: 1.0)
    ird(Pair(64, 64), Pair(1, 1), [0, 1], 9, 9, same, more=[2, 3])
    assert {seed for _, seed in same.asked} == {0, 1}, "as pairs with the same mask are"
    assert [told_apart(one) for one in ([1.0], [1.0, 1.1], [1.0, -0.5], [1.0, 0.2, 0.6], [-1.0, -1.0])] == [
        False,
        True,
        False,
        True,
        True,
    ]


def test_how_many_evaluations_close_calls_take() -> None:
    assert close_calls(3, 2, 0) == []
    assert close_calls(3, 1, 3) == [2 * 1, 2 * 2, 1, 2]
    assert close_calls(5, 2, 5) == [3 * 2, 2 * 3, 2, 3], "three of five, then two"
    assert close_calls(1, 1, 3) == [1, 2, 1, 2], "it and the best so far"
    start, noise = Pair(16, 16), {Pair(16, 16): 0.0, Pair(8, 16): 1.0, Pair(8, 8): 0.9, Pair(16, 8): -5.0}
    alternating = Scores(lambda pair, seed: noise[pair] * (-1) ** seed)
    outcome = ird(start, Pair(8, 8), [0], 1, 9, alternating, more=[1, 2, 3])
    assert outcome.evaluations == 1 + 3 + sum(close_calls(3, 1, 3))
    assert outcome.evaluations == most_evaluations(start, Pair(8, 8), 1, 1, more=3) - 2


def test_where_only_samples_shrink_a_round_has_one_candidate() -> None:
    start, minimum = Pair(128, 100), Pair(32, 100)
    assert most_evaluations(start, minimum, 9, 2) == (1 + 2 + 2) * 2
    assert most_evaluations(start, minimum, 9, 2, Shrink(both=True)) == (1 + 2 * 2 + 2) * 2
    scores = Scores(lambda pair, seed: -float(pair.samples))
    assert run(scores, start, minimum, [0, 1]).evaluations == (1 + 2) * 2
    noise = {Pair(128, 100): 0.0, Pair(64, 100): 1.0}
    alternating = Scores(lambda pair, seed: noise[pair] * (-1) ** seed)
    outcome = ird(start, Pair(64, 100), [0], 1, 9, alternating, more=[1, 2, 3])
    assert outcome.evaluations == most_evaluations(start, Pair(64, 100), 1, 1, more=3) - 2


def test_further_seeds() -> None:
    assert further_seeds([0, 1], 3) == [2, 3, 4]
    assert further_seeds([7, 1], 3) == [0, 2, 3]
    assert further_seeds([5], 0) == []


def test_is_pure_python() -> None:
    code = "import sys, irdscale.search.ird; print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
