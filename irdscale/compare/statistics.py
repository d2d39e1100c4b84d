"""Means over seeds and differences between two methods, with t intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

CONFIDENCE = 0.95
# Differences of equal scores are not quite equal in floating point; a spread below this share of them is none.
_ROUNDING = 1e-12


def interval(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean and 95 % t interval over seeds.

    Args:
        values: one metric per seed; None, for a seed that failed, is left out.

    Returns:
        {"mean", "low", "high", "n"}: n counts the values; mean is None without any, low and high with fewer than two.
    """
    present = [float(value) for value in values if value is not None]
    return _spread(present, max(map(abs, present), default=0.0))


def paired(
    reference: Mapping[Any, float | None], other: Mapping[Any, float | None], lower_is_better: bool
) -> dict[str, Any]:
    """Differences reference - other over the seeds that both have.

    Args:
        reference: seed -> metric, None where it failed.
        other: the same of the method that it is compared with.

    Returns:
        {"mean", "low", "high", "n"} of the differences as by `interval`; "wins", "losses" and "ties", counted where
        the reference is better, worse and equal; "p" of the two-sided paired t-test, None with fewer than two
        differences or where they are all the same, for which there is no t.
    """
    pairs = [
        (float(value), float(against))
        for seed, value in reference.items()
        if value is not None and (against := other.get(seed)) is not None
    ]
    differences = [a - b for a, b in pairs]
    gains = [-d if lower_is_better else d for d in differences]
    found = _spread(differences, max((abs(value) for pair in pairs for value in pair), default=0.0))
    p = None
    if found["n"] > 1 and found["high"] > found["low"]:
        error = stdev(differences) / sqrt(len(differences))
        p = float(2 * student.sf(abs(found["mean"]) / error, len(differences) - 1))
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return {**found, "wins": wins, "losses": losses, "ties": len(gains) - wins - losses, "p": p}


def paired_methods(reference: Mapping[str, Any], other: Mapping[str, Any], lower_is_better: bool) -> dict[str, Any]:
    """`paired` over the test metrics of two methods of a comparison, as its result holds them."""
    ours, others = ({one["seed"]: one["test"] for one in of["seeds"]} for of in (reference, other))
    return paired(ours, others, lower_is_better)


def _spread(values: list[float], scale: float) -> dict[str, Any]:
    n = len(values)
    mean = fmean(values) if values else None
    if mean is None or n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    deviation = stdev(values)
    half = 0.0
    if deviation > _ROUNDING * scale:
        half = float(student.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}
