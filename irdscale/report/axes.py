"""Axes of figures: plain numbers, breaks before values that are far off, and shades that do not show rounding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import Formatter, MaxNLocator, NullFormatter, NullLocator

from irdscale.utils.formats import number

BLUE, ORANGE, GREEN, GREY, RED = "#2563eb", "#ea7317", "#15803d", "#94a3b8", "#b91c1c"
INK = "#334155"
# Values are far off if they are further from the others than this many times the range of these.
FAR = 2.0
# Least range of an axis or a colour scale, as a share of its values: a smaller one would show rounding.
LEAST = 0.01
# Share of a range that is left free at each end, and height of the part for values far off.
_MARGIN, _PART = 0.09, 0.22


@dataclass(frozen=True)
class Panels:
    """A figure whose axis may be broken.

    Attributes:
        main: the axes with most of the values.
        parts: all axes, smallest values first; every artist is drawn in each.
    """

    figure: Figure
    main: Any
    parts: list[Any]


def canvas(width: float = 7.6, height: float = 4.2) -> tuple[Figure, Any]:
    """A figure, in inches, and its only axes, with a faint grid."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def broken(values: Iterable[float], width: float, height: float, along: str = "y") -> Panels:
    """A figure with one part for most of the values, and further parts for those that are far off.

    Args:
        values: everything that the figure shows on the axis.
        width, height: size in inches.
        along: axis to break, "x" or "y".
    """
    limits = value_ranges(values)
    most = max(range(len(limits)), key=lambda i: limits[i][2])
    ratios = [1.0 if i == most else _PART for i in range(len(limits))]
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(hspace=0.02, wspace=0.02))
    if along == "y":
        grid = figure.subplots(len(limits), 1, sharex=True, squeeze=False, height_ratios=ratios[::-1])
        parts = list(grid[::-1, 0])
    else:
        grid = figure.subplots(1, len(limits), sharey=True, squeeze=False, width_ratios=ratios)
        parts = list(grid[0])
    for i, (axes, (low, high, _)) in enumerate(zip(parts, limits, strict=True)):
        _style(axes)
        axis = axes.yaxis if along == "y" else axes.xaxis
        (axes.set_ylim if along == "y" else axes.set_xlim)(low, high)
        plain_axis(axis)
        if i != most:
            axis.set_major_locator(MaxNLocator(1 if along == "x" else 2))
        _open(axes, along, first=i == 0, last=i == len(parts) - 1)
    return Panels(figure, parts[most], parts)


def value_ranges(values: Iterable[float]) -> list[tuple[float, float, int]]:
    """Low end, high end and number of values of each part of an axis, smallest first.

    There is one part, unless some values are more than `FAR` ranges of the others away.
    """
    present = sorted(values)
    kept = without_far(present)
    below = [value for value in present if value < kept[0]]
    above = [value for value in present if value > kept[-1]]
    found = []
    for part in (below, kept, above):
        if part:
            low, high = widened(part[0], part[-1])
            margin = (high - low) * _MARGIN
            if part is not kept:
                # The parts of an axis do not overlap.
                gap = kept[0] - part[-1] if part is below else part[0] - kept[-1]
                margin = min(0.4 * (high - low), 0.3 * gap)
                low, high = max(low, part[0] - 0.1 * gap), min(high, part[-1] + 0.1 * gap)
            outward = max(margin, 0.15 * (high - low))
            ends = outward if part is below else margin, outward if part is above else margin
            found.append((low - ends[0], high + ends[1], len(part)))
    return found


def without_far(values: Iterable[float]) -> list[float]:
    """The values, ascending, without those far from the majority; all if the majority is one value."""
    present = sorted(values)
    # The narrowest majority, which grows to its neighbours until these are far off.
    half = len(present) // 2 + 1
    first = min(range(len(present) - half + 1), key=lambda i: present[i + half - 1] - present[i])
    last = first + half - 1
    while True:
        low, high = widened(present[first], present[last])
        reach = FAR * (high - low)
        if last + 1 < len(present) and present[last + 1] - present[last] <= reach:
            last += 1
        elif first > 0 and present[first] - present[first - 1] <= reach:
            first -= 1
        else:
            break
    return present if present[first] == present[last] else present[first : last + 1]


def widened(low: float, high: float) -> tuple[float, float]:
    """The range, or one of `LEAST` around its middle if it is smaller."""
    least = LEAST * max(abs(low), abs(high)) or 1.0
    if high - low >= least:
        return low, high
    middle = (low + high) / 2
    return middle - least / 2, middle + least / 2


def shades(values: Sequence[float], lower_is_better: bool) -> tuple[Colormap, Normalize]:
    """Colours of a metric: darker is better. Values that are far off get the colour of the nearest other."""
    kept = without_far(values)
    low, high = widened(kept[0], kept[-1])
    return blues(reverse=lower_is_better), Normalize(low, high, clip=True)


def blues(reverse: bool = False) -> Colormap:
    """Blues without white, from light to dark, or from dark to light."""
    whole = colormaps["Blues"]
    places = [0.12 + 0.84 * i / 255 for i in range(256)]
    colors = [whole(place) for place in (places[::-1] if reverse else places)]
    return LinearSegmentedColormap.from_list("shades", colors)


def luminance(color: Sequence[float]) -> float:
    """Brightness of a colour, 0 (black) to 1 (white)."""
    return 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]


def ink_on(color: Sequence[float]) -> str:
    """Colour of a text that can be read on a cell of this colour."""
    return "white" if luminance(color) < 0.5 else "black"


def plain(value: float) -> str:
    """A number in full, without an exponent: 0.00001, 12, 1,200,000."""
    return number(value, 10)


class _Plain(Formatter):
    """Plain numbers, without powers and offsets; on a linear axis all with as many decimals."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return plain(x)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        texts = [plain(value) for value in values]
        if self.axis.get_scale() != "linear":  # type: ignore[union-attr]
            return texts
        digits = max((len(text.partition(".")[2]) for text in texts), default=0)
        return [f"{float(text.replace(',', '')):,.{digits}f}" for text in texts]


def plain_axis(axis: Any) -> None:
    """Write an axis's ticks as plain numbers."""
    axis.set_major_formatter(_Plain())
    axis.set_minor_formatter(NullFormatter())


def plain_ticks(axis: Any, values: Iterable[float]) -> None:
    """Ticks at these values only, written in full."""
    values = sorted(set(values))
    axis.set_ticks(values, labels=[plain(value) for value in values])
    axis.set_minor_locator(NullLocator())


def side_by_side(groups: Sequence[Any], room: float) -> list[float]:
    """Shift of each item so that items of equal groups are beside each other, within `room` around their place."""
    members = {group: [i for i, one in enumerate(groups) if one == group] for group in set(groups)}
    widest = max(map(len, members.values()), default=1)
    step = room / widest
    shifts = [0.0] * len(groups)
    for found in members.values():
        for place, i in enumerate(found):
            shifts[i] = (place - (len(found) - 1) / 2) * step
    return shifts


def stacked(values: Sequence[float], touching: float) -> list[int]:
    """A level for each value, so that no two of the same level are closer than `touching`."""
    placed: list[tuple[float, int]] = []
    for value in values:
        taken = {level for other, level in placed if abs(other - value) < touching}
        placed.append((value, next(level for level in range(len(values) + 1) if level not in taken)))
    return [level for _, level in placed]


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _open(axes: Any, along: str, first: bool, last: bool) -> None:
    """Hide the frame at a break, and mark it with slanted lines."""
    slanted: dict[str, Any] = {
        "marker": [(-1, -0.6), (1, 0.6)] if along == "y" else [(-0.6, -1), (0.6, 1)],
        "markersize": 7,
    }
    slanted |= {"linestyle": "none", "color": INK, "markeredgewidth": 1, "clip_on": False, "zorder": 9}
    if not last:
        axes.plot([0] if along == "y" else [1], [1] if along == "y" else [0], transform=axes.transAxes, **slanted)
    if not first:
        axes.plot([0], [0], transform=axes.transAxes, **slanted)
        axes.spines["bottom" if along == "y" else "left"].set_visible(False)
        axes.tick_params(**({"bottom": False} if along == "y" else {"left": False}))
