"""The figures of a search's report that colour cells: pairs of sizes, modules of layers, and pairs of masks."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from irdscale.report.axes import INK, ORANGE, RED, blues, canvas, ink_on, plain, plain_axis, shades
from irdscale.utils.formats import count, number

if TYPE_CHECKING:
    from irdscale.report.facts import Facts

WHITE = (1.0, 1.0, 1.0, 1.0)
# Half the width and height of a cell of the path, in units of its place.
_HALF = 0.37
# Least ratio of the ends of a logarithmic colour scale: a smaller one would show rounding.
_LEAST_RATIO = 4.0


def path_of_rounds(facts: Facts) -> Figure | None:
    """Samples against parameters: every evaluated pair with its mean, and the path of the search.

    None for a single pair.
    """
    # Of two pairs of equal sizes, the one that the search moved to is drawn.
    rounds = sorted(facts.rounds, key=lambda c: c.chosen)
    means = {(c.params, c.samples): c.mean for c in rounds}
    known = [mean for mean in means.values() if mean is not None]
    if len(means) < 2:
        return None
    columns = {p: x for x, p in enumerate(sorted({p for p, _ in means}))}
    rows = {s: y for y, s in enumerate(sorted({s for _, s in means}))}
    figure, axes = canvas(2.6 + 1.15 * len(columns), 1.3 + 0.62 * len(rows))
    axes.grid(visible=False)
    task = facts.result["task"]
    digits = 3 if max(map(abs, known)) < 10 else 2
    colors, norm = shades([round(mean, digits) for mean in known], task["lower_is_better"])
    for (p, s), mean in means.items():
        x, y = columns[p], rows[s]
        color = WHITE if mean is None else colors(norm(round(mean, digits)))
        text, ink = ("failed", RED) if mean is None else (f"{mean:.{digits}f}", ink_on(color))
        axes.add_patch(_cell(x, y, facecolor=color, edgecolor="#cbd5e1", linewidth=0.6))
        axes.text(x, y, text, ha="center", va="center", fontsize=8, color=ink, zorder=5)
    path = [(columns[step["params"]], rows[step["samples"]]) for step in facts.result["path"]]
    for start, end in itertools.pairwise(path):
        axes.add_patch(_arrow(start, end))
    best = facts.result["best"]
    frame = {"facecolor": "none", "edgecolor": ORANGE, "linewidth": 2.6, "zorder": 4}
    axes.add_patch(_cell(columns[best["params"]], rows[best["samples"]], **frame))
    axes.set_xticks(list(columns.values()), [count(p) for p in columns])
    axes.set_yticks(list(rows.values()), [count(s) for s in rows])
    axes.set_xlim(-0.55, len(columns) - 0.45)
    axes.set_ylim(-0.55, len(rows) - 0.45)
    axes.set(xlabel="trainable parameters p", ylabel="samples s")
    _bar(figure, axes, colors, norm, f"mean {task['metric']} on selection\n(darker is better)")
    return figure


def _cell(x: float, y: float, **style: Any) -> Rectangle:
    return Rectangle((x - _HALF, y - _HALF), 2 * _HALF, 2 * _HALF, **style)


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> FancyArrowPatch:
    """An arrow between the edges of two cells."""
    across, up = end[0] - start[0], end[1] - start[1]
    share = (_HALF + 0.03) / max(abs(across), abs(up))
    first = start[0] + share * across, start[1] + share * up
    last = end[0] - share * across, end[1] - share * up
    style: dict[str, Any] = {
        "arrowstyle": "-|>",
        "mutation_scale": 11,
        "color": ORANGE,
        "linewidth": 2,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    return FancyArrowPatch(first, last, zorder=4, **style)


def mask_density(facts: Facts) -> Figure | None:
    """Layers by modules: the share of each one's entries that the winner trains.

    None without layers, or if all shares are equal up to rounding.
    """
    modules = list(dict.fromkeys(module for row in facts.layers.values() for module in row))
    if not modules or equal_density(facts) is not None:
        return None
    figure, axes = canvas(1.7 + 0.95 * len(modules), 1.9 + 0.34 * len(facts.layers))
    axes.grid(visible=False)
    grid = [[100 * row.get(module, float("nan")) for module in modules] for row in facts.layers.values()]
    shown = [float(f"{value:.2g}") for row in grid for value in row if value > 0]
    low, high = min(shown), max(shown)
    # Equal numbers have equal colours, and close ones similar colours.
    ratio = math.sqrt(max(1.0, _LEAST_RATIO / (high / low)))
    norm, colors = LogNorm(low / ratio, high * ratio), blues()
    axes.imshow(
        [[float(f"{v:.2g}") if v > 0 else float("nan") for v in row] for row in grid],
        cmap=colors,
        norm=norm,
        aspect="auto",
    )
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                ink = ink_on(colors(norm(float(f"{value:.2g}")))) if value > 0 else INK
                axes.text(x, y, number(value, 2), ha="center", va="center", fontsize=7.5, color=ink)
    axes.set_xticks(range(len(modules)), modules, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(facts.layers)), [str(layer) for layer in facts.layers])
    axes.set_ylabel("layer")
    _bar(figure, axes, colors, norm, "% of the entries")
    return figure


def equal_density(facts: Facts) -> str | None:
    """The share of every module's entries in the mask, as text in per cent; None if the shares differ, or are 0."""
    shares = [share for row in facts.layers.values() for share in row.values()]
    if not shares or min(shares) == 0 or max(shares) > 1.05 * min(shares):
        return None
    low, high = number(100 * min(shares), 2), number(100 * max(shares), 2)
    return f"{low} %" if low == high else f"{low} to {high} %"


def mask_overlap(facts: Facts) -> Figure | None:
    """Sample sets by sample sets: the share of the entries that two masks of the largest p share."""
    overlap = facts.analysis.overlap
    if overlap is None:
        return None
    names = overlap.names
    figure, axes = canvas(2.9 + 0.68 * len(names), 1.4 + 0.5 * len(names))
    axes.grid(visible=False)
    # A mask shares all entries with itself, which is left out.
    grid = [
        [float("nan") if x == y else round(100 * share) for x, share in enumerate(row)]
        for y, row in enumerate(overlap.shares)
    ]
    colors = blues()
    image = axes.imshow(grid, cmap=colors, vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                ink = ink_on(colors(image.norm(value)))
                axes.text(x, y, plain(value), ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="samples s", ylabel="samples s")
    _bar(figure, axes, colors, image.norm, "% of the entries shared")
    return figure


def _bar(figure: Figure, axes: Any, colors: Any, norm: Any, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import LogLocator, MaxNLocator

    bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes)
    bar.set_label(label, fontsize=8)
    narrow = isinstance(norm, LogNorm) and norm.vmax / norm.vmin < 1000  # type: ignore[operator]
    subs = (1.0, 2.0, 5.0) if narrow else (1.0,)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=subs) if isinstance(norm, LogNorm) else MaxNLocator(5))
    plain_axis(bar.ax.yaxis)
    bar.ax.tick_params(labelsize=8)
