"""Iterative range decreasing (IRD): the search over sample-parameter pairs, as a pure algorithm.

    state (s, p) <- (N, K)                                    s samples, p trainable parameters
    evaluate it
    each round:
        candidates <- (s/2, p)  (s, p/2)  (s/2, p/2)          never below the minima
        evaluate each with every seed                         mask -> sparse fine-tune -> metric
        (s, p) <- the candidate with the best mean
    until no candidate is left, max_rounds, or `patience` rounds without a new best
    return the best pair of all, and the best pair at every p

From the paper (arXiv 2403.08484): halving the samples and the parameters round by round, keeping the halves with the
larger Fisher information (the smaller in the reverse contrast), fine-tuning each candidate and going on from the
best. Ours, where its pseudo-code leaves them open: these three candidates, the start counted as a candidate of its
own, the stop rules, several seeds and their mean, the minima, that a pair is never evaluated twice, and that ties go
to fewer parameters, then fewer samples. Which samples and parameters the halves hold is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from irdscale.errors import RunError


class StartError(RunError):
    """The start of a search could not be evaluated."""


@dataclass(frozen=True, order=True)
class Pair:
    """A candidate: s samples, whose Fisher information chooses p trainable parameters."""

    samples: int
    params: int


@dataclass(frozen=True)
class Step:
    """A state that the search moved to, and its mean metric."""

    round: int
    pair: Pair
    mean: float


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        best: the pair with the best mean of all that were evaluated.
        mean: its mean over the seeds.
        path: the states moved to, the start first.
        means: over the seeds, of every pair with which none of them failed.
        pareto: the best pair at every p, the most parameters first.
        stop: why the search ended.
        evaluations: how many (pair, seed) were asked for.
        all_failed: whether it ended because every candidate of a round failed.
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
Rounds = Generator[tuple[int, Wanted], Metrics, Outcome]


def candidates(pair: Pair, minimum: Pair) -> list[Pair]:
    """The pairs one round may move to: with half of the samples, of the parameters, and of both."""
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
        evaluate: given the round and all its new (pair, seed), in order, returns their metrics, None for a failure. It
            is never asked for the same one twice. A pair with a failure cannot be chosen.
        lower_is_better: of the metrics.

    Raises:
        StartError: the start could not be evaluated.
        ValueError: a size is below 1, or the start below the minimum.
    """
    return together(
        [rounds(start, minimum, seeds, max_rounds, patience, lower_is_better)],
        lambda asked: [evaluate(*of_one) for of_one in asked if of_one is not None],
    )[0]


def rounds(
    start: Pair, minimum: Pair, seeds: Sequence[int], max_rounds: int, patience: int, lower_is_better: bool = False
) -> Rounds:
    """The search of `ird` as a generator: yields a round and what it wants evaluated, is sent the metrics."""
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
            metrics = dict(zip(wanted, (yield number, wanted), strict=True))
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
    """Run several searches round by round, so that what all of them ask for can be evaluated at once.

    Args:
        evaluate: given for each search its round and what it wants, None for one that has ended, returns the metrics
            of those that have not, in order.
    """
    outcomes: list[Outcome | None] = [None] * len(searches)
    asked: list[tuple[int, Wanted] | None] = [None] * len(searches)
    answers: list[Metrics | None] = [None] * len(searches)
    while None in outcomes:
        for place, search in enumerate(searches):
            if outcomes[place] is None:
                answer = answers[place]
                try:
                    asked[place] = next(search) if answer is None else search.send(answer)
                except StopIteration as ended:
                    outcomes[place], asked[place] = ended.value, None
        found = iter(evaluate(asked) if any(asked) else [])
        answers = [None if wanted is None else next(found) for wanted in asked]
    return [outcome for outcome in outcomes if outcome is not None]
