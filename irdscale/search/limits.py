"""What bounds a search, for progress bars and plans: the sizes it can reach, its rounds and its evaluations."""

from __future__ import annotations

from irdscale.search.ird import Pair, candidates


def reachable_sizes(start: Pair, minimum: Pair) -> tuple[list[int], list[int]]:
    """Every s and every p that a search from `start` can reach, the largest first."""
    return _halves(start.samples, minimum.samples), _halves(start.params, minimum.params)


def _halves(value: int, least: int) -> list[int]:
    sizes = [value]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes


def most_rounds(start: Pair, minimum: Pair, max_rounds: int) -> int:
    """How many rounds a search from `start` can have."""
    samples, params = reachable_sizes(start, minimum)
    # The longest way halves one of the two at a time.
    return min(max_rounds, len(samples) + len(params) - 2)


def most_candidates(start: Pair, minimum: Pair) -> int:
    """How many candidates a round can have: as many as the first, for a smaller pair is halved in no more ways."""
    return len(candidates(start, minimum))


def most_of_rounds(start: Pair, minimum: Pair, max_rounds: int, seeds: int) -> int:
    """How many evaluations all rounds can take."""
    return most_rounds(start, minimum, max_rounds) * most_candidates(start, minimum) * seeds


def most_evaluations(start: Pair, minimum: Pair, max_rounds: int, seeds: int) -> int:
    """How many evaluations the start, all rounds and the two pairs that the winner is compared with can take."""
    return (1 + 2) * seeds + most_of_rounds(start, minimum, max_rounds, seeds)
