"""Iterative range decreasing (IRD): the search over sample-parameter pairs, as a pure algorithm.

    state (s, p) <- (N, K)                                    s samples, p trainable parameters
    evaluate it
    each round:
        candidates <- (s/2, p)  (s, p/2)  (s/2, p/2)          never below the minima
        evaluate each with every seed                         mask -> sparse fine-tune -> metric
        (s, p) <- the candidate with the best mean
    until no candidate is left, max_rounds, or `patience` rounds without a new best
    return the best pair of all, and the best pair at every p

With further seeds a close call is decided by successive halving: those of the better half that are not told apart from
the best are evaluated with twice as many seeds, until one is left or the seeds are used up. So are a round's best and
the best so far.

From the paper (arXiv 2403.08484): halving the samples and the parameters round by round, keeping the halves with the
larger Fisher information (the smaller in the reverse contrast), fine-tuning each candidate and going on from the
best. Ours, where its pseudo-code leaves them open: these three candidates, the start counted as a candidate of its
own, the stop rules, several seeds and their mean, further seeds, the minima, that a pair is never evaluated twice, and
that ties go to fewer parameters, then fewer samples. Which samples and parameters the halves hold is not decided here.
Other shares than halves are `Shrink`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from irdscale.errors import RunError

if TYPE_CHECKING:
    from irdscale.config import SearchConfig


class StartError(RunError):
    """The start of a search could not be evaluated."""


@dataclass(frozen=True, order=True)
class Pair:
    """A candidate: s samples, whose Fisher information chooses p trainable parameters.

    Attributes:
        begin: place of the ranking at which the samples begin; above 0 only where both ends are candidates.
    """

    samples: int
    params: int
    begin: int = 0


@dataclass(frozen=True)
class Shrink:
    """How a round makes the samples and the parameters fewer.

    Attributes:
        keep: share of either that is kept, above 0 and below 1.
        both: the later samples of the ranking are a candidate beside the earlier ones, as many of them; where more than
            half are kept, the two overlap.
        reach: rounds from the start within which sizes and sample sets are listed; all of them if None.
    """

    keep: float = 0.5
    both: bool = False
    reach: int | None = None

    def kept(self, value: int) -> int:
        """How many of `value` are kept, rounded down; always fewer."""
        # Of the decimals as written: 0.7 x 10 is 7, and 0.29 x 100 is 29, which floats miss.
        return int(value * Fraction(str(self.keep)))

    @property
    def part(self) -> str:
        """What is kept, in words."""
        return "half" if self.keep == HALVES.keep else f"share of {self.keep:g}"


# The paper's.
HALVES = Shrink()


def shrink_of(search: SearchConfig) -> Shrink:
    """How the rounds of a search shrink its pairs."""
    # Halves are few; of larger shares there are so many that only those are listed that the rounds can come to.
    reach = search.max_rounds if search.keep > HALVES.keep else None
    return Shrink(search.keep, search.direction == "both", reach)


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
        means: over the seeds but the further ones, of every pair with which none of them failed.
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


def candidates(pair: Pair, minimum: Pair, shrink: Shrink = HALVES) -> list[Pair]:
    """The pairs one round may move to: with a part of the samples, of the parameters, and of both."""
    samples, params = shrink.kept(pair.samples), shrink.kept(pair.params)
    begins = [pair.begin, pair.begin + pair.samples - samples] if shrink.both else [pair.begin]
    parts = begins if samples >= minimum.samples else []
    found = [Pair(samples, pair.params, begin) for begin in parts]
    if params >= minimum.params:
        found.append(Pair(pair.samples, params, pair.begin))
        found += [Pair(samples, params, begin) for begin in parts]
    return found


def lattice(start: Pair, minimum: Pair, shrink: Shrink = HALVES) -> tuple[list[int], list[int]]:
    """Every s and every p that a search from `start` can reach, the largest first."""
    return _sizes(start.samples, minimum.samples, shrink), _sizes(start.params, minimum.params, shrink)


def _sizes(value: int, least: int, shrink: Shrink) -> list[int]:
    sizes = [value]
    while (kept := shrink.kept(sizes[-1])) >= least and (shrink.reach is None or len(sizes) <= shrink.reach):
        sizes.append(kept)
    return sizes


def sample_sets(samples: int, least: int, shrink: Shrink = HALVES) -> list[tuple[int, list[int]]]:
    """Where in the ranking the sample sets of a search begin, and the sizes of those that begin there.

    One pass over the first and largest set of a beginning makes the masks of all that begin there. With `shrink.both`,
    beginnings double with each size until they meet.
    """
    sizes = _sizes(samples, least, shrink)
    found = {0: [samples]}
    for larger, size in pairwise(sizes):
        # All sets of one size have been shrunk equally often, and any of them can lose either end next.
        later = [begin + larger - size for begin in found] if shrink.both else []
        for begin in dict.fromkeys([*found, *later]):
            found.setdefault(begin, []).append(size)
    return list(found.items())


def most_rounds(start: Pair, minimum: Pair, max_rounds: int, shrink: Shrink = HALVES) -> int:
    """How many rounds a search from `start` can have."""
    pair, rounds = start, 0
    while rounds < max_rounds and (found := candidates(pair, minimum, shrink)):
        # The longest way shrinks one of the two at a time.
        pair, rounds = found[0], rounds + 1
    return rounds


def most_candidates(start: Pair, minimum: Pair, shrink: Shrink = HALVES) -> int:
    """How many candidates a round can have: as many as the first, for a smaller pair shrinks in no more ways."""
    return len(candidates(start, minimum, shrink))


def most_evaluations(
    start: Pair, minimum: Pair, max_rounds: int, seeds: int, shrink: Shrink = HALVES, more: int = 0
) -> int:
    """How many evaluations the start, all rounds and the two pairs that the winner is compared with can take.

    Args:
        more: further seeds that decide close calls.
    """
    return (1 + 2) * seeds + most_of_rounds(start, minimum, max_rounds, seeds, shrink, more)


def most_of_rounds(
    start: Pair, minimum: Pair, max_rounds: int, seeds: int, shrink: Shrink = HALVES, more: int = 0
) -> int:
    """How many evaluations all rounds can take, their close calls included."""
    each = most_candidates(start, minimum, shrink)
    return most_rounds(start, minimum, max_rounds, shrink) * (each * seeds + sum(close_calls(each, seeds, more)))


def close_calls(of_round: int, seeds: int, more: int) -> list[int]:
    """How many evaluations the close calls of a round of so many candidates can take, step by step: among them, then of
    the round's best with the best so far."""
    left, count, steps = of_round, seeds, []
    while count < seeds + more:
        # One alone is not compared with others, but has its seeds all the same when it is with the best so far.
        left, further = min(left, _better_half(left)), min(count, seeds + more - count)
        steps.append((left, further))
        count += further
    return [left * further for left, further in steps] + [further for _, further in steps]


def _better_half(candidates: int) -> int:
    """How many of a field go on; two that are not told apart both do."""
    return max(2, (candidates + 1) // 2)


def further_seeds(seeds: Sequence[int], more: int) -> list[int]:
    """The seeds beyond those of a search that decide its close calls: the smallest that are not among them."""
    return [seed for seed in range(len(seeds) + more) if seed not in seeds][:more]


def told_apart(differences: Sequence[float]) -> bool:
    """Whether paired differences are beyond noise: their mean by more than two standard errors, or all are 0."""
    if len(differences) < 2:
        return False
    mean = sum(differences) / len(differences)
    variance = sum((one - mean) ** 2 for one in differences) / (len(differences) - 1)
    return mean**2 > 4 * variance / len(differences) or not any(differences)


def best_of(means: dict[Pair, float], lower_is_better: bool = False) -> Pair:
    """The pair with the largest mean, or the smallest; ties go to fewer parameters, fewer samples, the earlier ones."""
    return ordered(means, lower_is_better)[0]


def ordered(means: dict[Pair, float], lower_is_better: bool = False) -> list[Pair]:
    """The pairs by their means, the best one first, with ties as in `best_of`."""
    sign = 1 if lower_is_better else -1
    return sorted(means, key=lambda pair: (sign * means[pair], pair.params, pair.samples, pair.begin))


def ird(
    start: Pair,
    minimum: Pair,
    seeds: Sequence[int],
    max_rounds: int,
    patience: int,
    evaluate: Evaluate,
    lower_is_better: bool = False,
    shrink: Shrink = HALVES,
    more: Sequence[int] = (),
) -> Outcome:
    """Run the search.

    Args:
        minimum: smallest samples and parameters of a candidate, each at least 1.
        evaluate: given the round and all its new (pair, seed), in order, returns their metrics, None for a failure. It
            is never asked for the same one twice. A pair with a failure cannot be chosen.
        lower_is_better: of the metrics.
        shrink: what a round keeps; its `reach` bounds no search.
        more: further seeds, for close calls, in the order in which they are used.

    Raises:
        StartError: the start could not be evaluated.
        ValueError: a size is below 1, or the start below the minimum.
    """
    return together(
        [rounds(start, minimum, seeds, max_rounds, patience, lower_is_better, shrink, more)],
        lambda asked: [evaluate(*of_one) for of_one in asked if of_one is not None],
    )[0]


Rounds = Generator[tuple[int, Wanted], Metrics, Outcome]


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


def rounds(
    start: Pair,
    minimum: Pair,
    seeds: Sequence[int],
    max_rounds: int,
    patience: int,
    lower_is_better: bool = False,
    shrink: Shrink = HALVES,
    more: Sequence[int] = (),
) -> Rounds:
    """The search of `ird` as a generator: yields a round and what it wants evaluated, is sent the metrics."""
    if min(minimum.samples, minimum.params) < 1:
        raise ValueError(f"found minimum {minimum}; expected at least 1 each")
    if start.samples < minimum.samples or start.params < minimum.params:
        raise ValueError(f"found start {start}; expected at least the minimum {minimum}")
    # Each pair's metrics are those of the first seeds in this order, so that any two share those of the shorter list.
    order = [*seeds, *more]
    results: dict[Pair, list[float | None]] = {}

    def evaluate(round_number: int, pairs: list[Pair], count: int) -> Generator[tuple[int, Wanted], Metrics, None]:
        """Have each pair's first `count` seeds evaluated, as far as they are not."""
        wanted = [(pair, seed) for pair in pairs for seed in order[len(results.get(pair, [])) : count]]
        if wanted:
            metrics = yield round_number, wanted
            for (pair, _), metric in zip(wanted, metrics, strict=True):
                results.setdefault(pair, []).append(metric)

    def means(pairs: Sequence[Pair], count: int) -> dict[Pair, float]:
        """The means over the first `count` seeds of those pairs with which none of these failed."""
        found = {pair: [metric for metric in results[pair][:count] if metric is not None] for pair in pairs}
        return {pair: sum(ended) / count for pair, ended in found.items() if len(ended) == count}

    def close(one: Pair, other: Pair, count: int) -> bool:
        pairs = zip(results[one][:count], results[other][:count], strict=True)
        return not told_apart([a - b for a, b in pairs if a is not None and b is not None])

    def best_in(round_number: int, field: list[Pair]) -> Generator[tuple[int, Wanted], Metrics, Pair | None]:
        """The best of the field, by more seeds as long as the call is close; None if all failed with the first ones."""
        left, count, best = field, len(seeds), None
        yield from evaluate(round_number, left, count)
        while scored := means(left, count):
            best, *others = ordered(scored, lower_is_better)
            left = [best, *(pair for pair in others if close(best, pair, count))][: _better_half(len(left))]
            if len(left) == 1 or count == len(order):
                break
            count = min(2 * count, len(order))
            yield from evaluate(round_number, left, count)
        return best

    if (yield from best_in(0, [start])) is None:
        raise StartError(f"the start, {start.samples} samples and {start.params} parameters, could not be evaluated")
    state, best, since_best = start, start, 0
    states = [(0, start)]
    stop, all_failed = f"max_rounds = {max_rounds} reached", False
    for round_number in range(1, max_rounds + 1):
        next_pairs = candidates(state, minimum, shrink)
        if not next_pairs:
            stop = f"no {shrink.part} of {state.samples} samples or {state.params} parameters is above the minima"
            break
        chosen = yield from best_in(round_number, next_pairs)
        if chosen is None:
            stop, all_failed = f"every candidate of round {round_number} failed", True
            break
        state = chosen
        states.append((round_number, state))
        leader = (yield from best_in(round_number, [best, state])) or best
        since_best = 0 if leader != best else since_best + 1
        best = leader
        if since_best >= patience:
            stop = f"no new best for patience = {patience} rounds"
            break
    found = means(list(results), len(seeds))
    path = [Step(number, pair, found[pair]) for number, pair in states]
    by_params = {params: [pair for pair in found if pair.params == params] for params in {p.params for p in found}}
    pareto = [
        # What the further seeds decided is not undone.
        best if best.params == params else best_of({pair: found[pair] for pair in by_params[params]}, lower_is_better)
        for params in sorted(by_params, reverse=True)
    ]
    return Outcome(best, found[best], path, found, pareto, stop, sum(map(len, results.values())), all_failed)
