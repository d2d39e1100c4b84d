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
    times = {name: round(statistics.median(seconds[name]), 4) for name in (over, under)}
    return figure(part, what, model, tokens, ratio, (low, high), limit, at_least) | {"seconds": times}


def figure(
    part: str,
    what: str,
    model: str,
    tokens: int,
    value: float,
    spread: tuple[float, float] | None = None,
    limit: float | None = None,
    at_least: float | None = None,
) -> dict[str, Any]:
    """A row of a value that is no ratio of repeated times, and whether the bar is met.

    Args:
        spread: the lowest and the highest found; the value itself, unless given.
    """
    low, high = spread or (value, value)
    # What is shown is what is judged.
    value = round(value, 3)
    met = None
    if limit is not None:
        met = value <= limit
    elif at_least is not None:
        met = value >= at_least
    return {
        "part": part,
        "what": what,
        "model": model,
        "tokens": tokens,
        "ratio": value,
        "low": round(low, 3),
        "high": round(high, 3),
        "bar": f"<= {limit}" if limit is not None else f">= {at_least}" if at_least is not None else "",
        "met": met,
        "seconds": {},
    }


def line_of(row: dict[str, Any], seconds: float) -> str:
    """A row for people, as it is measured; a missed bar is marked.

    Args:
        seconds: time that it took to measure.
    """
    mark = {True: "met   ", False: "MISSED", None: "      "}[row["met"]]
    asked = f", asked {row['bar']}" if row["bar"] else ""
    tokens = f" x {row['tokens']} tokens" if row["tokens"] else ""
    spread = f"{row['low']:.3g} to {row['high']:.3g}"
    return f"{mark} {seconds:6.1f} s  {row['what']}, {row['model']}{tokens}: {row['ratio']:.3g} ({spread}{asked})"
