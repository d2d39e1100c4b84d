"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from math import log10
from typing import Any

from matplotlib.figure import Figure

from irdscale.compare.verdict import gain, reference_of, side
from irdscale.report.figures import BLUE, GREEN, GREY, ORANGE, RED, canvas, plain_ticks, pngs

_FURTHER = ("#7c3aed", "#0891b2", "#be185d", "#65a30d", "#78350f", "#475569", "#eab308", "#a78bfa", "#111827")
_COLORS = (BLUE, ORANGE, GREEN, RED, *_FURTHER)
_MARKERS = "osD^vP*X<>hdp"
# Distance of points with equal parameters, as a share of the axis.
_APART = 0.01


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
    if not any(method["test"]["n"] for method in study["methods"]):
        return None
    figure, axes = _rows(study["methods"])
    reference = reference_of(study)
    band = reference["test"]
    if band["low"] is not None:
        axes.axvspan(band["low"], band["high"], color=BLUE, alpha=0.1, linewidth=0, label="interval of the reference")
    elif band["mean"] is not None:
        axes.axvline(band["mean"], color=BLUE, alpha=0.3, label="the reference")
    if study["base"] and study["base"]["test"] is not None:
        axes.axvline(study["base"]["test"], color=RED, linewidth=1.2, linestyle="--", label="the base model")
    dots, means = None, None
    for y, method in enumerate(study["methods"]):
        points = [one["test"] for one in method["seeds"] if one["test"] is not None]
        if not points:
            axes.text(0.01, y, "failed", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=RED)
            continue
        dots = axes.scatter(points, [y + 0.22] * len(points), s=11, color=GREY, zorder=2)
        color = BLUE if method is reference else "#334155"
        means = _bar(axes, method["test"], y, color)
    if dots is not None and means is not None:
        dots.set_label("one seed")
        means.set_label("mean, 95 % interval")
    axes.set_xlabel(f"{_plain(study['task']['metric'])} on the test split, {_better(study)}")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    return figure


def score_by_parameters(study: dict[str, Any]) -> Figure | None:
    """Test score against trainable parameters; a method that trains only the head is a line."""
    tested = [(m, style) for m, style in _styled(study["methods"]) if m["test"]["mean"] is not None]
    placed = [m for m, _ in tested if m["params"]]
    if not placed:
        return None
    figure, axes = canvas(8.4, 4.8)
    axes.set_xscale("log")
    logs = [log10(m["params"]) for m in placed]
    span = max(max(logs) - min(logs), 0.5)
    shifts = _side_by_side(logs, span)
    handles: list[Any] = []
    for method, style in tested:
        test, label = method["test"], _plain(method["label"])
        if method["params"] == 0:
            line = axes.axhline(test["mean"], color=style["color"], linewidth=1.2, linestyle="--", label=label)
            handles.append(line)
        elif method["params"]:
            x = 10 ** (log10(method["params"]) + shifts[placed.index(method)])
            half = None if test["low"] is None else [[test["mean"] - test["low"]], [test["high"] - test["mean"]]]
            handles.append(axes.errorbar(x, test["mean"], yerr=half, markersize=6, linewidth=1.1, label=label, **style))
    axes.set_xlim(10 ** (min(logs) - 0.12 * span), 10 ** (max(logs) + 0.12 * span))
    axes.set(
        xlabel="trainable parameters beside the head",
        ylabel=f"{_plain(study['task']['metric'])} on the test split, {_better(study)}",
    )
    _legend(axes, handles=handles)
    return figure


def differences(study: dict[str, Any]) -> Figure | None:
    """Paired differences to the reference with their intervals."""
    shown = [method for method in study["methods"] if gain(study, method) is not None]
    if not shown:
        return None
    figure, axes = _rows(shown)
    axes.axvline(0, color="#334155", linewidth=1)
    for y, method in enumerate(shown):
        color = {1: BLUE, -1: ORANGE, 0: GREY}[side(gain(study, method))]
        _bar(axes, method["difference"], y, color)
    label = _plain(reference_of(study)["label"])
    left, right = (f"{label} is better", f"{label} is worse")
    if not study["task"]["lower_is_better"]:
        left, right = right, left
    # Show both sides of zero.
    low, high = axes.get_xlim()
    room = 0.15 * max(abs(low), abs(high))
    axes.set_xlim(min(low, -room), max(high, room))
    axes.set_xlabel(f"← {left}      {label} minus the method, {_plain(study['task']['metric'])}      {right} →")
    return figure


def selection_by_rate(study: dict[str, Any]) -> Figure | None:
    """Selection metric of every method at each learning rate; the chosen one is large."""
    lines = [
        (method, style, [(p["learning_rate"], p["selection"]) for p in method["grid"] if p["selection"] is not None])
        for method, style in _styled(study["methods"])
    ]
    rates = {rate for _, _, points in lines for rate, _ in points}
    if not rates:
        return None
    figure, axes = canvas(8.4, 4.8)
    axes.set_xscale("log")
    for method, style, points in lines:
        if not points:
            continue
        sizes = [90 if rate == method["learning_rate"] else 22 for rate, _ in points]
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, linewidth=1.1, markersize=4.7, label=_plain(method["label"]), **style)
        axes.scatter(*zip(*points, strict=True), s=sizes, color=style["color"], marker=style["marker"], zorder=3)
    plain_ticks(axes.xaxis, rates)
    axes.margins(x=0.08)
    axes.set(
        xlabel="learning rate", ylabel=f"{_plain(study['task']['metric'])} on the selection split, {_better(study)}"
    )
    _legend(axes)
    return figure


def _rows(methods: list[dict[str, Any]]) -> tuple[Figure, Any]:
    """Axes with a row for each method, the first on top."""
    figure, axes = canvas(8.0, 1.3 + 0.34 * len(methods))
    axes.set_yticks(range(len(methods)), [_plain(method["label"]) for method in methods], fontsize=9)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _bar(axes: Any, found: dict[str, Any], y: float, color: str) -> Any:
    half = None if found["low"] is None else [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
    return axes.errorbar(found["mean"], y, xerr=half, fmt="o", markersize=5.5, linewidth=1.8, color=color, zorder=3)


def _styled(methods: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each method with a colour and a marker; more than 13 share them."""
    for number, method in enumerate(methods):
        yield method, {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}


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


def _legend(axes: Any, **more: Any) -> None:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), **more)


def _better(study: dict[str, Any]) -> str:
    return f"{'lower' if study['task']['lower_is_better'] else 'higher'} is better"


def _plain(text: str) -> str:
    """The text with dollars escaped, which matplotlib would read as a formula."""
    return text.replace("$", r"\$")
