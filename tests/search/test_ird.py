"""The search algorithm on synthetic score functions."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irdscale.errors import RunError
from irdscale.search.ird import Outcome, Pair, best_of, candidates, ird
from irdscale.search.limits import most_evaluations, most_rounds, reachable_sizes

SIZES = st.integers(1, 300)
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
) -> Outcome:
    return ird(start, minimum, seeds, max_rounds, patience, scores)


@settings(max_examples=200, deadline=None)
@given(st.data(), SIZES, SIZES, SIZES, SIZES, SEEDS, st.integers(1, 12), st.integers(1, 4))
def test_invariants_on_any_landscape(
    data: st.DataObject, s: int, p: int, s0: int, p0: int, seeds: list[int], max_rounds: int, patience: int
) -> None:
    start, minimum = Pair(max(s, s0), max(p, p0)), Pair(min(s, s0), min(p, p0))
    table: dict[tuple[Pair, int], float | None] = {}

    def score(pair: Pair, seed: int) -> float | None:
        if (pair, seed) not in table:
            table[pair, seed] = data.draw(st.one_of(st.floats(-1, 1), st.none()) if pair != start else st.floats(-1, 1))
        return table[pair, seed]

    scores = Scores(score)
    outcome = run(scores, start, minimum, seeds, max_rounds, patience)
    assert set(scores.asked.values()) == {1}, "never evaluated twice"
    assert outcome.evaluations == len(scores.asked)
    reachable_s, reachable_p = reachable_sizes(start, minimum)
    assert len(outcome.path) - 1 <= most_rounds(start, minimum, max_rounds)
    assert outcome.evaluations <= most_evaluations(start, minimum, max_rounds, len(seeds)) - 2 * len(seeds)
    for pair, _ in scores.asked:
        assert pair.samples in reachable_s
        assert pair.params in reachable_p
        assert pair.samples >= minimum.samples
        assert pair.params >= minimum.params
    assert [number for number, _ in scores.rounds] == sorted({number for number, _ in scores.rounds})
    assert len(outcome.path) <= max_rounds + 1
    for earlier, later in zip(outcome.path, outcome.path[1:], strict=False):
        moved = candidates(earlier.pair, minimum)
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
    reachable_s, reachable_p = reachable_sizes(start, minimum)
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
    assert reachable_sizes(Pair(7, 5), Pair(1, 2)) == ([7, 3, 1], [5, 2])
    outcome = run(Scores(lambda pair, seed: 0.0), Pair(10, 20), Pair(10, 20), [0])
    assert outcome.stop == "no half of 10 samples or 20 parameters is above the minima"


def test_where_only_samples_shrink_a_round_has_one_candidate() -> None:
    start, minimum = Pair(128, 100), Pair(32, 100)
    assert most_evaluations(start, minimum, 9, 2) == (1 + 2 + 2) * 2
    scores = Scores(lambda pair, seed: -float(pair.samples))
    assert run(scores, start, minimum, [0, 1]).evaluations == (1 + 2) * 2


def test_is_pure_python() -> None:
    code = "import sys, irdscale.search.ird; print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
