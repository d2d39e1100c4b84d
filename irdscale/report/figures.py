"""The figures of a report, each a matplotlib Figure without global state."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

if TYPE_CHECKING:
    from irdscale.report.facts import Facts

BLUE, ORANGE, GREEN, GREY, RED = "#2563eb", "#ea7317", "#15803d", "#94a3b8", "#b91c1c"


def draw_all(facts: Facts) -> dict[str, bytes]:
    """Name -> PNG of each figure that the search has data for."""
    return pngs(
        metric=metric_by_parameters(facts),
        path=path_of_rounds(facts),
        density=mask_density(facts),
        traces=trace_distribution(facts),
        overlap=mask_overlap(facts),
        drift=layer_drift(facts),
        cost=cost(facts),
    )


def pngs(**figures: Figure | None) -> dict[str, bytes]:
    """Name -> PNG of each figure that is not None."""
    return {name: png(figure) for name, figure in figures.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, the same bytes for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def canvas(width: float = 7.6, height: float = 4.2) -> tuple[Figure, Any]:
    """A figure, in inches, and its only axes, with a faint grid."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def plain_ticks(axis: Any, values: Iterable[float]) -> None:
    """Ticks at these values only, written in full."""
    values = sorted(set(values))
    axis.set_ticks(values, labels=[f"{v:,}" for v in values])
    axis.set_minor_locator(NullLocator())


def metric_by_parameters(facts: Facts) -> Figure:
    """Selection metric against trainable parameters: candidates, the best at each p, and the baselines."""
    figure, axes = canvas()
    result = facts.result
    for number, candidate in enumerate(facts.rounds):
        points = [m for m in candidate.metrics.values() if m is not None]
        axes.scatter([candidate.params] * len(points), points, s=12, color=GREY, label=None if number else "one seed")
        if candidate.mean is not None:
            label = None if number else "candidate, mean"
            axes.scatter(candidate.params, candidate.mean, s=44, color=BLUE, alpha=0.75, label=label, zorder=3)
    front = [(entry["params"], entry["metric"]) for entry in result["pareto"]]
    axes.plot(*zip(*front, strict=True), color=BLUE, linewidth=1.2, alpha=0.6, label="best at each size")
    best = result["best"]
    ring = {"s": 190, "facecolors": "none", "edgecolors": BLUE, "linewidths": 2, "zorder": 4}
    axes.scatter(best["params"], best["metric"], label="winner", **ring)
    fish = result["baseline"]["fish_random"]
    if fish["metric"] is not None:
        axes.scatter(
            fish["params"], fish["metric"], s=60, marker="D", color=ORANGE, label="random samples (FISH)", zorder=3
        )
    for name, label in (("linear_probe", "head alone (linear probe)"), ("base", "the base model")):
        entry = result["baseline"].get(name)
        if entry and entry["metric"] is not None:
            axes.axhline(entry["metric"], color=RED, linewidth=1.2, linestyle="--", label=label)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, [c.params for c in facts.rounds])
    axes.set(xlabel="trainable parameters of the mask", ylabel=f"{result['task']['metric']} on the selection split")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def path_of_rounds(facts: Facts) -> Figure:
    """Samples against parameters: every evaluated pair with its mean, and the path of the search."""
    figure, axes = canvas()
    # Of two pairs of equal sizes, the one that the search moved to is drawn.
    rounds = sorted(facts.rounds, key=lambda c: c.chosen)
    means = {(c.params, c.samples): c.mean for c in rounds if c.mean is not None}
    xs, ys, colors = [p for p, _ in means], [s for _, s in means], list(means.values())
    points = axes.scatter(xs, ys, c=colors, s=1300, marker="s", cmap="Blues", edgecolors="white", zorder=2)
    limits = (min(colors), max(colors))
    for (p, s), mean in means.items():
        dark = limits[1] > limits[0] and (mean - limits[0]) / (limits[1] - limits[0]) > 0.55
        axes.annotate(
            f"{mean:.3f}", (p, s), ha="center", va="center", fontsize=8, color="white" if dark else "black", zorder=5
        )
    for c in facts.rounds:
        if c.mean is None:
            axes.scatter(c.params, c.samples, s=300, marker="x", color=RED, zorder=2)
    path = facts.result["path"]
    for start, end in itertools.pairwise(path):
        arrow = {"arrowstyle": "-|>", "color": ORANGE, "linewidth": 2, "shrinkA": 19, "shrinkB": 19}
        axes.annotate(
            "", (end["params"], end["samples"]), (start["params"], start["samples"]), arrowprops=arrow, zorder=4
        )
    best = facts.result["best"]
    axes.scatter(
        best["params"],
        best["samples"],
        s=1700,
        marker="s",
        facecolors="none",
        edgecolors=ORANGE,
        linewidths=2.2,
        zorder=3,
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    plain_ticks(axes.xaxis, [c.params for c in facts.rounds])
    plain_ticks(axes.yaxis, [c.samples for c in facts.rounds])
    axes.margins(0.18)
    axes.set(xlabel="trainable parameters p", ylabel="samples s")
    figure.colorbar(points, ax=axes, label=f"mean {facts.result['task']['metric']} on selection")
    return figure


def mask_density(facts: Facts) -> Figure | None:
    """Layers by modules: the share of each one's entries that the winner trains."""
    modules = list(dict.fromkeys(module for row in facts.layers.values() for module in row))
    if not modules:
        return None
    figure, axes = canvas(1.7 + 0.95 * len(modules), 1.9 + 0.34 * len(facts.layers))
    axes.grid(visible=False)
    grid = [[100 * row.get(module, float("nan")) for module in modules] for row in facts.layers.values()]
    shown = [value for row in grid for value in row if value > 0]
    norm = LogNorm(min(shown), max(max(shown), min(shown) * 1.01)) if shown else None
    image = axes.imshow(
        [[v if v > 0 else float("nan") for v in row] for row in grid], cmap="Blues", norm=norm, aspect="auto"
    )
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                dark = bool(norm) and value > 0 and float(norm(value)) > 0.6  # type: ignore[misc]
                text = "0" if value == 0 else f"{value:.2g}"
                axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "#334155")
    axes.set_xticks(range(len(modules)), modules, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(facts.layers)), [str(layer) for layer in facts.layers])
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="% of the entries")
    return figure


def trace_distribution(facts: Facts) -> Figure:
    """Each pool sample's Fisher trace by rank, and which samples the winner's mask is made from."""
    figure, axes = canvas()
    for kept, color, label in ((True, BLUE, "kept by the winner"), (False, GREY, "dropped")):
        ranks = [rank for rank, (_, inside) in enumerate(facts.traces, start=1) if inside is kept]
        values = [value for value, inside in facts.traces if inside is kept]
        if values:
            axes.scatter(ranks, values, s=9, color=color, label=f"{label} ({len(values)})")
    if min(value for value, _ in facts.traces) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="sample, by rank", ylabel="Fisher trace (sum of squared gradients)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def mask_overlap(facts: Facts) -> Figure | None:
    """Sample sets by sample sets: the share of the entries that two masks of the largest p share."""
    overlap = facts.analysis.overlap
    if overlap is None:
        return None
    count = len(overlap.names)
    figure, axes = canvas(2.6 + 0.62 * count, 1.6 + 0.5 * count)
    axes.grid(visible=False)
    grid = [[100 * share for share in row] for row in overlap.shares]
    image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            color = "white" if value > 60 else "#334155"
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(count), overlap.names, fontsize=8)
    axes.set_yticks(range(count), overlap.names, fontsize=8)
    axes.set(xlabel="samples s", ylabel="samples s")
    figure.colorbar(image, ax=axes, label="% of the entries shared")
    return figure


def layer_drift(facts: Facts) -> Figure | None:
    """The change of each layer's share of the mask, a line for each sample set but the largest."""
    layers, sizes = facts.analysis.layers, facts.analysis.sizes
    if len(layers) < 2:
        return None
    figure, axes = canvas(max(7.6, 2.5 + 0.22 * len(layers)))
    axes.axhline(0, color=GREY, linewidth=1)
    shades = colormaps["Blues"]
    for i, size in enumerate(sizes[1:], start=1):
        color = ORANGE if i == len(sizes) - 1 else shades(0.3 + 0.6 * i / len(sizes))
        values = [100 * (layer.shares[i] - layer.shares[0]) for layer in layers]
        axes.plot(range(len(layers)), values, marker="o", markersize=3.5, linewidth=1.3, color=color, label=f"{size:,}")
    step = -(-len(layers) // 32)
    ticks = sorted({*range(0, len(layers), step), len(layers) - 1})
    axes.set_xticks(ticks, [layers[i].name for i in ticks], fontsize=8)
    axes.set(xlabel="layer", ylabel=f"change from {sizes[0]:,} samples, points")
    axes.legend(
        frameon=False, fontsize=8, title="samples s", title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    return figure


def cost(facts: Facts) -> Figure:
    """Seconds by phase."""
    figure, axes = canvas(height=2.4)
    names = {"fisher": "Fisher passes and masks", "train": "candidates", "baseline": "baselines", "test": "test split"}
    seconds = facts.result["seconds"]
    present = [name for name in reversed(names) if name in seconds]
    bars = axes.barh([names[n] for n in present], [seconds[n] for n in present], color=BLUE, alpha=0.8)
    axes.bar_label(bars, fmt="%.0f s", padding=4, fontsize=8)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlabel("seconds")
    return figure
