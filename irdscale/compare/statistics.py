"""Means over seeds and differences between two methods, with t intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t, ttest_1samp

CONFIDENCE = 0.95
# Two values tell next to nothing of their spread: t is 12.7 there, and an interval reaches over the metric's range.
FEWEST_SEEDS = 3
ANY = (-inf, inf)
# Differences of equal scores are not quite equal in floating point; a spread below this share of them is none.
_ROUNDING = 1e-12


def interval(values: Iterable[float | None], within: tuple[float, float] = ANY) -> dict[str, Any]:
    """Mean and 95 % t interval over seeds.

    Args:
        values: one metric per seed; None, for a seed that failed, is left out.
        within: the metric's smallest and largest value, at which the interval ends.

    Returns:
        {"mean", "low", "high", "n"}: n counts the values; mean is None without any, low and high with fewer than
        three.
    """
    present = [float(value) for value in values if value is not None]
    return _spread(present, max(map(abs, present), default=0.0), within)


def paired(
    reference: Mapping[Any, float | None],
    other: Mapping[Any, float | None],
    lower_is_better: bool,
    within: tuple[float, float] = ANY,
) -> dict[str, Any]:
    """Differences reference - other over the seeds that both have.

    Args:
        reference: seed -> metric, None where it failed.
        other: the same of the method that it is compared with.
        within: the metric's smallest and largest value, which no difference is further apart than.

    Returns:
        {"mean", "low", "high", "n"} of the differences as by `interval`; "wins", "losses" and "ties", counted where
        the reference is better, worse and equal; "p" of the two-sided paired t-test, None with fewer than three
        differences or where they are all the same, for which there is no t.
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
        p = float(ttest_1samp(differences, 0.0).pvalue)
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return {**found, "wins": wins, "losses": losses, "ties": len(gains) - wins - losses, "p": p}


def paired_methods(
    reference: Mapping[str, Any], other: Mapping[str, Any], lower_is_better: bool, within: tuple[float, float] = ANY
) -> dict[str, Any]:
    """`paired` over the test metrics of two methods of a comparison, as its result holds them."""
    ours, others = ({one["seed"]: one["test"] for one in of["seeds"]} for of in (reference, other))
    return paired(ours, others, lower_is_better, within)


def _spread(values: list[float], scale: float, within: tuple[float, float]) -> dict[str, Any]:
    n = len(values)
    mean = fmean(values) if values else None
    if mean is None or n < FEWEST_SEEDS:
        return {"mean": mean, "low": None, "high": None, "n": n}
    low = high = mean
    if (deviation := stdev(values)) > _ROUNDING * scale:
        low, high = map(float, t.interval(CONFIDENCE, n - 1, mean, deviation / sqrt(n)))
    # Where all values are equal, rounding of their mean may be outside.
    return {"mean": mean, "low": min(mean, max(within[0], low)), "high": max(mean, min(within[1], high)), "n": n}
