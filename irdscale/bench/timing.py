"""Side-by-side timing: ratios within one run, as medians over interleaved repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def side_by_side(measured: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function in each repeat; the order turns from repeat to repeat. One warm-up goes first."""
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    names = list(measured)
    for repeat in range(repeats + 1):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            measured[name]()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def row(
    part: str,
    what: str,
    model: str,
    tokens: int,
    seconds: dict[str, list[float]],
    over: str,
    under: str,
    limit: float | None = None,
    at_least: float | None = None,
) -> dict[str, Any]:
    """A row of the result: `seconds[over] / seconds[under]`, its quartiles, and whether the bar is met."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    met = None
    if limit is not None:
        met = ratio <= limit
    elif at_least is not None:
        met = ratio >= at_least
    asked = f"<= {limit}" if limit is not None else f">= {at_least}" if at_least is not None else ""
    times = {name: statistics.median(seconds[name]) for name in (over, under)}
    return {
        "part": part,
        "what": what,
        "model": model,
        "tokens": tokens,
        "ratio": round(ratio, 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "bar": asked,
        "met": met,
        "seconds": {name: round(value, 4) for name, value in times.items()},
    }
