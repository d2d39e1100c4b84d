"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import log10
from typing import Any

from matplotlib.figure import Figure

from irdscale.compare.verdict import gain, reference_of, side
from irdscale.report.axes import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    Panels,
    broken,
    plain_ticks,
    side_by_side,
    stacked,
)
from irdscale.report.figures import pngs

_FURTHER = ("#7c3aed", "#0891b2", "#be185d", "#65a30d", "#78350f", "#475569", "#eab308", "#a78bfa", "#111827")
_COLORS = (BLUE, ORANGE, GREEN, RED, *_FURTHER)
_MARKERS = "osD^vP*X<>hdp"
# Distance of points with equal parameters, as a share of the axis.
_APART = 0.025
# Space between two learning rates that the points of all methods take, as a share.
_ROOM = 0.4
# Scores closer than this share of the axis are drawn on different heights.
_TOUCHING = 0.014


def draw_all(study: dict[str, Any]) -> dict[str, bytes]:
    """Figure name -> PNG, for each figure with data."""
    return pngs(
        scores=scores(study),
        parameters=score_by_parameters(study),
        differences=differences(study),
        rates=selection_by_rate(study),
    )


def scores(study: dict[str, Any]) -> Figure | None:
    """Test score of every method: seeds, mean and interval; the reference's interval is a band."""
    methods = study["methods"]
    points = [[one["test"] for one in method["seeds"] if one["test"] is not None] for method in methods]
    if not any(method["test"]["n"] for method in methods):
        return None
    reference = reference_of(study)
    band, base = reference["test"], study["base"] and study["base"]["test"]
    ends = [end for method in methods for end in (method["test"]["low"], method["test"]["high"])]
    panels = _rows(methods, _known([*(value for each in points for value in each), *ends, base]))
    for axes in panels.parts:
        if band["low"] is not None:
            axes.axvspan(
                band["low"], band["high"], color=BLUE, alpha=0.1, linewidth=0, label="interval of the reference"
            )
        elif band["mean"] is not None:
            axes.axvline(band["mean"], color=BLUE, alpha=0.3, label="the reference")
        if base is not None:
            axes.axvline(base, color=RED, linewidth=1.2, linestyle="--", label="the base model")
        low, high = axes.get_xlim()
        dots, means = None, None
        for y, (method, values) in enumerate(zip(methods, points, strict=True)):
            if not values:
                if axes is panels.main:
                    place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8, "color": RED}
                    axes.text(0.01, y, "failed", **place)
                continue
            heights = stacked(values, _TOUCHING * (high - low))
            rise = min(0.11, 0.28 / max(1, *heights))
            dots = axes.scatter(values, [y + 0.22 + rise * height for height in heights], s=9, color=GREY, zorder=2)
            means = _bar(axes, method["test"], y - 0.08, BLUE if method is reference else INK)
        if dots is not None and means is not None:
            dots.set_label("one seed")
            means.set_label("mean, 95 % interval")
    panels.figure.supxlabel(f"{_plain(study['task']['metric'])} on the test split, {_better(study)}", fontsize=10)
    handles, labels = panels.main.get_legend_handles_labels()
    panels.figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside upper center", ncols=4)
    return panels.figure


def score_by_parameters(study: dict[str, Any]) -> Figure | None:
    """Test score against trainable parameters; a method that trains only the head is a line.

    None if fewer than two methods train parameters beside the head.
    """
    tested = [(m, style) for m, style in _styled(study["methods"]) if m["test"]["mean"] is not None]
    placed = [m for m, _ in tested if m["params"]]
    if len(placed) < 2:
        return None
    logs = [log10(m["params"]) for m in placed]
    span = max(max(logs) - min(logs), 0.5)
    shifts = _side_by_side(logs, span)
    ends = [m["test"][end] for m, _ in tested for end in ("mean", "low", "high")]
    panels = broken(_known(ends), 9.6, 4.8)
    handles: list[Any] = []
    for axes in panels.parts:
        handles = []
        for method, style in tested:
            test, label = method["test"], _plain(method["label"])
            if method["params"] == 0:
                line = axes.axhline(test["mean"], color=style["color"], linewidth=1.2, linestyle="--", label=label)
                handles.append(line)
            elif method["params"]:
                x = 10 ** (log10(method["params"]) + shifts[placed.index(method)])
                half = None if test["low"] is None else [[test["mean"] - test["low"]], [test["high"] - test["mean"]]]
                bar = {"markersize": 6, "linewidth": 1.1, "linestyle": "none", "label": label, **style}
                handles.append(axes.errorbar(x, test["mean"], yerr=half, **bar))
    lowest = panels.parts[0]
    lowest.set_xscale("log")
    plain_ticks(lowest.xaxis, _apart({round(m["params"]) for m in placed}, span))
    low, high = min(logs) + min(shifts), max(logs) + max(shifts)
    lowest.set_xlim(10 ** (low - 0.08 * span), 10 ** (high + 0.08 * span))
    lowest.set_xlabel("trainable parameters beside the head")
    panels.main.set_ylabel(f"{_plain(study['task']['metric'])} on the test split, {_better(study)}")
    _legend(panels, handles)
    return panels.figure


def differences(study: dict[str, Any]) -> Figure | None:
    """Paired differences to the reference with their intervals."""
    shown = [method for method in study["methods"] if gain(study, method) is not None]
    if not shown:
        return None
    ends = _known(method["difference"][end] for method in shown for end in ("mean", "low", "high"))
    panels = _rows(shown, [*ends, 0.0])
    low, high = panels.main.get_xlim()
    if low <= 0 <= high:
        # Show both sides of zero.
        room = 0.15 * max(-low, high)
        panels.main.set_xlim(min(low, -room), max(high, room))
    for axes in panels.parts:
        axes.axvline(0, color=INK, linewidth=1)
        for y, method in enumerate(shown):
            color = {1: BLUE, -1: ORANGE, 0: GREY}[side(gain(study, method))]
            _bar(axes, method["difference"], y, color)
    label = _plain(reference_of(study)["label"])
    left, right = (f"{label} is better", f"{label} is worse")
    if not study["task"]["lower_is_better"]:
        left, right = right, left
    words = f"← {left}      {label} minus the method, {_plain(study['task']['metric'])}      {right} →"
    panels.figure.supxlabel(words, fontsize=10)
    return panels.figure


def selection_by_rate(study: dict[str, Any]) -> Figure | None:
    """Selection metric of every method at each learning rate; the chosen one has a ring.

    None for a single learning rate, which leaves nothing to choose.
    """
    lines = [
        (method, style, [(p["learning_rate"], p["selection"]) for p in method["grid"] if p["selection"] is not None])
        for method, style in _styled(study["methods"])
    ]
    lines = [line for line in lines if line[2]]
    rates = sorted({rate for _, _, points in lines for rate, _ in points})
    if len(rates) < 2:
        return None
    logs = [log10(rate) for rate in rates]
    gap = min(b - a for a, b in pairwise(logs))
    panels = broken([value for _, _, points in lines for _, value in points], 9.6, 4.8)
    shifts = side_by_side([0] * len(lines), _ROOM * gap)
    for axes in panels.parts:
        for (method, style, points), shift in zip(lines, shifts, strict=True):
            xs = [rate * 10**shift for rate, _ in sorted(points)]
            ys = [value for _, value in sorted(points)]
            axes.plot(xs, ys, linewidth=0.9, markersize=4.5, label=_plain(method["label"]), **style)
            chosen = [(rate * 10**shift, value) for rate, value in points if rate == method["learning_rate"]]
            if chosen:
                ring = {"s": 95, "facecolors": "none", "edgecolors": style["color"], "linewidths": 1.2, "zorder": 3}
                axes.scatter(*zip(*chosen, strict=True), **ring)
    lowest = panels.parts[0]
    lowest.set_xscale("log")
    plain_ticks(lowest.xaxis, rates)
    lowest.margins(x=0.08)
    lowest.set_xlabel("learning rate")
    panels.main.set_ylabel(f"{_plain(study['task']['metric'])} on the selection split, {_better(study)}")
    _legend(panels, panels.main.get_legend_handles_labels()[0])
    return panels.figure


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _rows(methods: list[dict[str, Any]], values: list[float]) -> Panels:
    """Axes with a row for each method, the first on top, and these values along x."""
    panels = broken(values, 9.0, 1.4 + 0.38 * len(methods), along="x")
    first = panels.parts[0]
    first.set_yticks(range(len(methods)), [_plain(method["label"]) for method in methods], fontsize=9)
    first.set_ylim(len(methods) - 0.5, -0.5)
    for axes in panels.parts:
        axes.grid(visible=False, axis="y")
        if axes is not first:
            axes.tick_params(labelleft=False)
    return panels


def _bar(axes: Any, found: dict[str, Any], y: float, color: str) -> Any:
    half = None if found["low"] is None else [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
    return axes.errorbar(found["mean"], y, xerr=half, fmt="o", markersize=5.5, linewidth=1.8, color=color, zorder=3)


def _styled(methods: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each method with a colour and a marker; more than 13 share them."""
    for number, method in enumerate(methods):
        yield method, {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}


def _apart(values: Iterable[int], span: float) -> list[int]:
    """The values without those whose tick labels would touch the one before."""
    kept: list[int] = []
    for value in sorted(values):
        if not kept or log10(value / kept[-1]) > 0.12 * span:
            kept.append(value)
    return kept


def _side_by_side(logs: list[float], span: float) -> list[float]:
    """Shift of each point, in units of `logs`, so that no two overlap."""
    step = _APART * span
    moved: list[float] = [0.0] * len(logs)
    groups: list[list[int]] = []
    for i in sorted(range(len(logs)), key=lambda i: logs[i]):
        if groups and logs[i] - logs[groups[-1][0]] < step:
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        for place, i in enumerate(sorted(group)):
            moved[i] = (place - (len(group) - 1) / 2) * step
    return moved


def _legend(panels: Panels, handles: list[Any]) -> None:
    panels.figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside right center")


def _better(study: dict[str, Any]) -> str:
    return f"{'lower' if study['task']['lower_is_better'] else 'higher'} is better"


def _plain(text: str) -> str:
    """The text with dollars escaped, which matplotlib would read as a formula."""
    return text.replace("$", r"\$")
