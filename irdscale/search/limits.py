"""Limits of a search, for progress bars and plans: its smallest pair, sizes, rounds and evaluations."""

from __future__ import annotations

from irdscale.config.schema import RunConfig
from irdscale.search.ird import Pair, candidates


def smallest_pair(config: RunConfig, start: Pair, parameters: int) -> Pair:
    """The smallest samples and parameters of a candidate.

    Args:
        parameters: entries of all the model's parameters.
    """
    min_ratio = config.search.min_ratio if config.search.min_ratio is not None else config.search.ratio / 8
    return Pair(config.search.min_samples, min(start.params, max(1, round(min_ratio * parameters))))


def reachable_sizes(start: Pair, minimum: Pair) -> tuple[list[int], list[int]]:
    """All s and all p that a search from `start` can reach, in descending order."""
    return _halves(start.samples, minimum.samples), _halves(start.params, minimum.params)


def _halves(value: int, least: int) -> list[int]:
    sizes = [value]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes


def most_rounds(start: Pair, minimum: Pair, max_rounds: int) -> int:
    """Most rounds of a search from `start`."""
    samples, params = reachable_sizes(start, minimum)
    # The longest path halves one of the two at a time.
    return min(max_rounds, len(samples) + len(params) - 2)


def most_candidates(start: Pair, minimum: Pair) -> int:
    """Most candidates of a round: those of the first, because a smaller pair has no more halves."""
    return len(candidates(start, minimum))


def most_of_rounds(start: Pair, minimum: Pair, max_rounds: int, seeds: int) -> int:
    """Most evaluations of all rounds."""
    return most_rounds(start, minimum, max_rounds) * most_candidates(start, minimum) * seeds


def most_evaluations(start: Pair, minimum: Pair, max_rounds: int, seeds: int) -> int:
    """Most evaluations of the start, all rounds and the two baselines."""
    return (1 + 2) * seeds + most_of_rounds(start, minimum, max_rounds, seeds)
