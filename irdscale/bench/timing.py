"""Side-by-side timing: ratios within one run, as medians over interleaved repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from irdscale.utils.formats import count, number


def side_by_side(measured: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function in each repeat, after one warm-up; the order rotates from repeat to repeat."""
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
    """A row of the result: median and quartiles of `seconds[over] / seconds[under]`, and whether the bar is met."""
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
    """A row of any value, and whether the bar is met.

    Args:
        spread: lowest and highest measurement; by default the value itself.
    """
    low, high = spread or (value, value)
    # The shown value is the one compared with the bar.
    value = round(value, 3)
    met = value <= limit if limit is not None else value >= at_least if at_least is not None else None
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
    """A row as a line of text, in which a missed bar is marked.

    Args:
        seconds: time of the measurement.
    """
    mark = {True: "met   ", False: "MISSED", None: "      "}[row["met"]]
    bar = f", bar {row['bar']}" if row["bar"] else ""
    tokens = f" x {count(row['tokens'])} tokens" if row["tokens"] else ""
    spread = f"{number(row['low'], 3)} to {number(row['high'], 3)}"
    return f"{mark} {seconds:6.1f} s  {row['what']}, {row['model']}{tokens}: {number(row['ratio'], 3)} ({spread}{bar})"
