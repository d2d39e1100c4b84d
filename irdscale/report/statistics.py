"""Means over seeds and paired differences between two methods, with t intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf, sqrt
from statistics import fmean, stdev
from typing import Any

CONFIDENCE = 0.95
# With two values t is 12.7, and an interval covers the metric's whole range.
FEWEST_SEEDS = 3
# With so many seeds, a difference is no longer only a hint.
ENOUGH_SEEDS = 5
ANY = (-inf, inf)
# Relative spread that counts as rounding error of equal values.
_ROUNDING = 1e-12


def interval(values: Iterable[float | None], within: tuple[float, float] = ANY) -> dict[str, Any]:
    """Mean and 95 % t interval over seeds.

    Args:
        values: metric of each seed; None (a failed seed) is left out.
        within: smallest and largest value of the metric, which bound the interval.

    Returns:
        {"mean", "low", "high", "n"}: n counts the values; mean is None without values, low and high with fewer than
        three.
    """
    present = [float(value) for value in values if value is not None]
    return _spread(present, max(map(abs, present), default=0.0), within)


def seed_range(differences: Sequence[float]) -> tuple[float, float]:
    """The range of a difference that the seeds leave open, which decides whether two methods are told apart.

    Args:
        differences: difference of each seed, at least one.

    Returns:
        The 95 % t interval of their mean; the smallest and the largest with fewer than three.
    """
    found = interval(differences)
    return (min(differences), max(differences)) if found["low"] is None else (found["low"], found["high"])


def paired(
    reference: Mapping[Any, float | None],
    other: Mapping[Any, float | None],
    lower_is_better: bool,
    within: tuple[float, float] = ANY,
) -> dict[str, Any]:
    """Differences reference - other over the seeds of both.

    Args:
        reference, other: seed -> metric, None for a failed seed.
        within: smallest and largest value of the metric, which bound the differences.

    Returns:
        {"mean", "low", "high", "n"} of the differences, as in `interval`; "wins", "losses" and "ties": seeds where the
        reference is better, worse and equal; "p" of the two-sided paired t-test, None with fewer than three
        differences or if all are equal.
    """
    pairs = [
        (float(value), float(against))
        for seed, value in reference.items()
        if value is not None and (against := other.get(seed)) is not None
    ]
    differences = [a - b for a, b in pairs]
    gains = [-d if lower_is_better else d for d in differences]
    scale, widest = max((abs(value) for pair in pairs for value in pair), default=0.0), within[1] - within[0]
    found = _spread(differences, scale, (-widest, widest))
    p = None
    if found["n"] >= FEWEST_SEEDS and found["high"] > found["low"]:
        from scipy.stats import ttest_1samp

        p = float(ttest_1samp(differences, 0.0).pvalue)
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return {**found, "wins": wins, "losses": losses, "ties": len(gains) - wins - losses, "p": p}


def paired_methods(
    reference: Mapping[str, Any], other: Mapping[str, Any], lower_is_better: bool, within: tuple[float, float] = ANY
) -> dict[str, Any]:
    """`paired` for the test metrics of two methods in a comparison's result."""
    ours, others = ({one["seed"]: one["test"] for one in of["seeds"]} for of in (reference, other))
    return paired(ours, others, lower_is_better, within)


def as_gain(difference: Mapping[str, Any], lower_is_better: bool) -> dict[str, Any]:
    """A difference of `paired` as a gain: positive if the reference is better.

    Returns:
        {"mean", "low", "high", "n"}, as in `interval`.
    """
    mean, low, high = difference["mean"], difference["low"], difference["high"]
    if lower_is_better:
        # 0 - 0 is 0, where -(0.0) is -0.
        mean, low, high = (None if value is None else 0 - value for value in (mean, high, low))
    return {"mean": mean, "low": low, "high": high, "n": difference["n"]}


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the same order.

    Rejecting those of at most alpha keeps the probability of any false rejection at most alpha.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure. Scandinavian Journal of Statistics 6.
    """
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def _spread(values: list[float], scale: float, within: tuple[float, float]) -> dict[str, Any]:
    n = len(values)
    mean = fmean(values) if values else None
    if mean is None or n < FEWEST_SEEDS:
        return {"mean": mean, "low": None, "high": None, "n": n}
    low = high = mean
    if (deviation := stdev(values)) > _ROUNDING * scale:
        from scipy.stats import t

        low, high = map(float, t.interval(CONFIDENCE, n - 1, mean, deviation / sqrt(n)))
    # Rounding may move the mean of equal values outside.
    return {"mean": mean, "low": min(mean, max(within[0], low)), "high": max(mean, min(within[1], high)), "n": n}
