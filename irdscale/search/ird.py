"""Iterative range decreasing (IRD): the search over sample-parameter pairs, as a pure algorithm.

    state (s, p) <- (N, K)                                    s samples, p trainable parameters
    evaluate it
    each round:
        candidates <- (s/2, p)  (s, p/2)  (s/2, p/2)          never below the minima
        evaluate each with every seed                         mask -> sparse fine-tune -> metric
        (s, p) <- the candidate with the best mean
    until no candidate is left, max_rounds, or `patience` rounds without a new best
    return the best pair of all, and the best pair at every p

The paper (arXiv 2403.08484) halves the samples and the parameters round by round, keeps the halves with the larger
Fisher information (the smaller in reverse IRD), fine-tunes each candidate and goes on from the best. Its pseudo-code
leaves the rest open. This package chose: these three candidates, the start as a candidate of its own, the stop rules,
the mean over several seeds, the minima, no pair evaluated twice, and ties to fewer parameters, then fewer samples.
Other modules choose the samples and parameters of each half.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from irdscale.errors import RunError


class StartError(RunError):
    """The start of the search failed."""


@dataclass(frozen=True, order=True)
class Pair:
    """A sample-parameter pair: p trainable parameters chosen by the Fisher information of s samples."""

    samples: int
    params: int


@dataclass(frozen=True)
class Step:
    """A state of the search and its mean metric."""

    round: int
    pair: Pair
    mean: float


@dataclass(frozen=True)
class Outcome:
    """The result of a search.

    Attributes:
        best: pair with the best mean of all evaluated pairs.
        mean: its mean metric over the seeds.
        path: states of the search, the start first.
        means: pair -> mean metric over the seeds, without pairs of which a seed failed.
        pareto: best pair at every p, in descending order of p.
        stop: reason why the search ended.
        evaluations: number of requested (pair, seed) evaluations.
        all_failed: whether the search ended because all candidates of a round failed.
    """

    best: Pair
    mean: float
    path: list[Step]
    means: dict[Pair, float]
    pareto: list[Pair]
    stop: str
    evaluations: int
    all_failed: bool = False


Wanted = list[tuple[Pair, int]]
Metrics = list[float | None]
Evaluate = Callable[[int, Wanted], Metrics]
Rounds = Generator[tuple[int, Wanted], Metrics | None, Outcome]


def candidates(pair: Pair, minimum: Pair) -> list[Pair]:
    """The next pairs: half the samples, half the parameters, and half of both."""
    s, p = pair.samples // 2, pair.params // 2
    found = [Pair(s, pair.params)] if s >= minimum.samples else []
    if p >= minimum.params:
        found += [Pair(half.samples, p) for half in (pair, *found)]
    return found


def best_of(means: dict[Pair, float], lower_is_better: bool = False) -> Pair:
    """The pair with the largest mean, or the smallest; ties go to fewer parameters, then fewer samples."""
    sign = 1 if lower_is_better else -1
    return min(means, key=lambda pair: (sign * means[pair], pair.params, pair.samples))


def ird(
    start: Pair,
    minimum: Pair,
    seeds: Sequence[int],
    max_rounds: int,
    patience: int,
    evaluate: Evaluate,
    lower_is_better: bool = False,
) -> Outcome:
    """Run the search.

    Args:
        minimum: smallest samples and parameters of a candidate, each at least 1.
        evaluate: takes the round and its new (pair, seed) evaluations and returns their metrics in order, None for a
            failure. It gets no evaluation twice. A pair with a failure cannot be chosen.
        lower_is_better: whether smaller metrics are better.

    Raises:
        StartError: the start failed.
        ValueError: a minimum is below 1, or the start is below the minimum.
    """
    return together(
        [rounds(start, minimum, seeds, max_rounds, patience, lower_is_better)],
        lambda asked: [evaluate(*of_one) for of_one in asked if of_one is not None],
    )[0]


def rounds(
    start: Pair, minimum: Pair, seeds: Sequence[int], max_rounds: int, patience: int, lower_is_better: bool = False
) -> Rounds:
    """`ird` as a generator: yields each round with its new evaluations, and is sent their metrics."""
    if min(minimum.samples, minimum.params) < 1:
        raise ValueError(f"found minimum {minimum}; expected at least 1 each")
    if start.samples < minimum.samples or start.params < minimum.params:
        raise ValueError(f"found start {start}; expected at least the minimum {minimum}")
    asked: set[Pair] = set()
    means: dict[Pair, float] = {}
    path: list[Step] = []
    state, best, best_round = start, start, 0
    stop, all_failed = f"max_rounds = {max_rounds} reached", False
    for number in range(max_rounds + 1):
        field = candidates(state, minimum) if path else [start]
        if not field:
            stop = f"no half of {state.samples} samples or {state.params} parameters is above the minima"
            break
        new = [pair for pair in field if pair not in asked]
        if new:
            asked.update(new)
            wanted = [(pair, seed) for pair in new for seed in seeds]
            metrics = dict(zip(wanted, (yield number, wanted) or [], strict=True))
            for pair in new:
                of_pair = [metric for seed in seeds if (metric := metrics[pair, seed]) is not None]
                if len(of_pair) == len(seeds):
                    means[pair] = sum(of_pair) / len(seeds)
        ended = {pair: means[pair] for pair in field if pair in means}
        if not ended and not path:
            raise StartError(
                f"the start, {start.samples} samples and {start.params} parameters, could not be evaluated"
            )
        if not ended:
            stop, all_failed = f"every candidate of round {number} failed", True
            break
        state = best_of(ended, lower_is_better)
        path.append(Step(number, state, means[state]))
        leader = best_of(means, lower_is_better)
        if leader != best:
            best, best_round = leader, number
        if number - best_round >= patience:
            stop = f"no new best for patience = {patience} rounds"
            break
    of_params = {pair.params: {one: means[one] for one in means if one.params == pair.params} for pair in means}
    pareto = [best_of(of_params[params], lower_is_better) for params in sorted(of_params, reverse=True)]
    return Outcome(best, means[best], path, means, pareto, stop, len(asked) * len(seeds), all_failed)


def together(
    searches: Sequence[Rounds], evaluate: Callable[[list[tuple[int, Wanted] | None]], list[Metrics]]
) -> list[Outcome]:
    """Run several searches round by round, so that their evaluations can run side by side.

    Args:
        evaluate: takes each search's round and new evaluations (None for a finished search) and returns the metrics of
            the unfinished searches, in order.
    """
    outcomes: dict[int, Outcome] = {}
    answers: list[Metrics | None] = [None] * len(searches)
    while len(outcomes) < len(searches):
        asked: list[tuple[int, Wanted] | None] = [None] * len(searches)
        for place, search in enumerate(searches):
            if place not in outcomes:
                try:
                    asked[place] = search.send(answers[place])
                except StopIteration as ended:
                    outcomes[place] = ended.value
        found = iter(evaluate(asked) if any(asked) else [])
        answers = [None if wanted is None else next(found) for wanted in asked]
    return [outcomes[place] for place in range(len(searches))]
