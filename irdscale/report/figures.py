"""The figures of a search's report, each a matplotlib Figure without global state, or None with nothing to show."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from irdscale.report.axes import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    broken,
    canvas,
    plain_axis,
    plain_ticks,
    side_by_side,
    stacked,
)
from irdscale.report.heat_maps import mask_density, mask_overlap, path_of_rounds
from irdscale.utils.formats import count

if TYPE_CHECKING:
    from irdscale.report.facts import Candidate, Facts

# Width of the candidates of one size, in doublings of the parameters.
ROOM = 0.62
# Largest number of parameter sizes whose ticks are written horizontally.
_LEVEL = 6
# Traces with a larger ratio get a logarithmic axis.
_LOG_FROM = 10


def draw_all(facts: Facts) -> dict[str, bytes]:
    """Name -> PNG of each figure that the search has data for."""
    return pngs(
        metric=metric_by_parameters(facts),
        path=path_of_rounds(facts),
        density=mask_density(facts),
        traces=trace_distribution(facts),
        overlap=mask_overlap(facts),
    )


def pngs(**figures: Figure | None) -> dict[str, bytes]:
    """Name -> PNG of each figure that is not None."""
    return {name: png(figure) for name, figure in figures.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, the same bytes for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def metric_by_parameters(facts: Facts) -> Figure | None:
    """Selection metric against trainable parameters: candidates, the best at each p, and the baselines.

    Candidates of one size are beside each other. None for a single candidate.
    """
    result, shown = facts.result, _distinct(facts.rounds)
    lines = {
        label: entry["metric"]
        for name, label in (("linear_probe", "head alone (linear probe)"), ("base", "the base model"))
        if (entry := result["baseline"].get(name)) and entry["metric"] is not None
    }
    fish, best = result["baseline"]["fish_random"], result["best"]
    if len(shown) < 2 and fish["metric"] is None and not lines:
        return None
    seeds = [[value for value in one.metrics.values() if value is not None] for one in shown]
    means = [one.mean for one in shown if one.mean is not None]
    values = [*means, *(value for each in seeds for value in each), *lines.values()]
    has_fish = fish["metric"] is not None
    panels = broken([*values, *([fish["metric"]] if has_fish else [])], 9.6, 4.6)
    places = [one.params for one in shown] + [fish["params"]] * has_fish
    factors = [2**shift for shift in side_by_side(places, ROOM)]
    xs = [place * factor for place, factor in zip(places, factors, strict=True)]
    most = max(map(places.count, places))
    apart = min(0.05, ROOM / most / max(map(len, seeds)))
    for axes in panels.parts:
        low, high = axes.get_ylim()
        for number, (one, x, points) in enumerate(zip(shown, xs, seeds, strict=False)):
            # The mean is a dash, which hides no seed; seeds that would touch are beside each other.
            levels = stacked(points, 0.016 * (high - low))
            beside = [x * 2 ** (apart * (level - max(levels) / 2)) for level in levels]
            axes.plot([x] * len(points), points, color=GREY, linewidth=0.8, zorder=2)
            if one.mean is not None:
                dash = {"s": 190, "marker": "_", "linewidths": 2.4, "color": BLUE, "zorder": 3}
                axes.scatter(x, one.mean, label=None if number else "candidate, mean", **dash)
            axes.scatter(beside, points, s=10, color=INK, label=None if number else "one seed", zorder=4)
            if (one.samples, one.params) == (best["samples"], best["params"]):
                ring = {"s": 320, "facecolors": "none", "edgecolors": ORANGE, "linewidths": 2, "zorder": 4}
                axes.scatter(x, best["metric"], label="winner", **ring)
        front = [(xs[shown.index(one)], one.mean) for one in _front(facts, shown)]
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color=BLUE, linewidth=1.1, alpha=0.5, label="best at each size")
        if has_fish:
            label = "random samples (FISH)"
            axes.scatter(xs[-1], fish["metric"], s=44, marker="D", color=GREEN, label=label, zorder=3)
        for label, value in lines.items():
            axes.axhline(value, color=RED, linewidth=1.2, linestyle="--", label=label)
    main, lowest = panels.main, panels.parts[0]
    lowest.set_xscale("log")
    plain_ticks(lowest.xaxis, {one.params for one in shown})
    if len({one.params for one in shown}) > _LEVEL:
        lowest.tick_params(axis="x", labelrotation=35)
    lowest.set_xlim(min(places) / 1.7, max(places) * 1.7)
    lowest.set_xlabel("trainable parameters of the mask")
    main.set_ylabel(f"{result['task']['metric']} on the selection split")
    handles, labels = main.get_legend_handles_labels()
    panels.figure.legend(handles, labels, frameon=False, fontsize=8, labelspacing=0.9, loc="outside right center")
    return panels.figure


def _distinct(rounds: Sequence[Candidate]) -> list[Candidate]:
    """One candidate for each pair of sizes, most samples first; the one that the search moved to if it did."""
    found: dict[tuple[int, int], Candidate] = {}
    for one in sorted(rounds, key=lambda c: c.chosen):
        found[one.params, one.samples] = one
    return sorted(found.values(), key=lambda one: (one.params, -one.samples))


def _front(facts: Facts, shown: Sequence[Candidate]) -> list[Candidate]:
    pairs = {(entry["samples"], entry["params"]) for entry in facts.result["pareto"]}
    return [one for one in shown if (one.samples, one.params) in pairs and one.mean is not None]


def trace_distribution(facts: Facts) -> Figure | None:
    """Each pool sample's Fisher trace by rank, and which samples the winner's mask is made from.

    None if all traces are equal.
    """
    values = [value for value, _ in facts.traces]
    low, high = min(values), max(values)
    if low == high:
        return None
    figure, axes = canvas()
    logarithmic = low > 0 and high / low >= _LOG_FROM
    floor = low / 1.3 if logarithmic else min(0.0, low)
    # Each sample has a line of its own place, so that no mark hides another.
    width = min(2.0, 330 / len(values))
    for kept, color, label in ((True, BLUE, "kept by the winner"), (False, GREY, "dropped")):
        ranks = [rank for rank, (_, inside) in enumerate(facts.traces, start=1) if inside is kept]
        if ranks:
            tops = [values[rank - 1] for rank in ranks]
            axes.vlines(ranks, floor, tops, color=color, linewidth=width, label=f"{label} ({count(len(ranks))})")
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)))
    axes.set_ylim(floor, high * (1.15 if logarithmic else 1.05))
    plain_axis(axes.yaxis)
    plain_axis(axes.xaxis)
    axes.set(xlabel="sample, by rank", ylabel="Fisher trace (sum of squared gradients)")
    axes.legend(frameon=False, fontsize=8)
    return figure
