"""Axes break before values that are far off, ticks are plain numbers, and shades do not show rounding."""

from __future__ import annotations

import re

import pytest

from irdscale.report.axes import (
    broken,
    canvas,
    luminance,
    plain,
    plain_axis,
    shades,
    side_by_side,
    stacked,
    value_ranges,
    without_far,
)
from irdscale.report.pages import sized
from irdscale.utils.formats import number

CLOSE = [0.70, 0.71, 0.72, 0.74, 0.75]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "0.00001"),
        (0.5, "0.5"),
        (12.0, "12"),
        (1234567.0, "1,234,567"),
        (-0.25, "-0.25"),
        (0.0, "0"),
        (-0.0, "0"),
    ],
)
def test_numbers_are_written_in_full(value: float, text: str) -> None:
    assert plain(value) == text


def test_rounded_numbers_have_no_exponent() -> None:
    assert (number(12.34, 2), number(0.0000123, 2), number(99.7, 2)) == ("12", "0.000012", "100")
    assert (sized(None), sized(1234), sized(0.123456), sized("a class")) == ("–", "1,234", "0.1235", "a class")


def test_values_far_off_have_their_own_part() -> None:
    assert without_far([*CLOSE, 0.1, 5.0]) == CLOSE
    low, main, high = value_ranges([*CLOSE, 0.1, 5.0])
    assert main[0] < 0.70
    assert main[1] > 0.75
    assert main[1] - main[0] < 1.5 * (0.75 - 0.70)
    assert low[0] < 0.1 < low[1] < main[0]
    assert main[1] < high[0] < 5.0 < high[1]


def test_parts_do_not_overlap() -> None:
    parts = value_ranges([51.1, 51.4, 51.9, 56.6, 57.0, 102.0, 137.0, 182.0, -68.0])
    assert len(parts) == 3
    assert parts[0][1] < parts[1][0]
    assert parts[1][1] < parts[2][0]
    assert all(any(low <= value <= high for low, high, _ in parts) for value in (51.1, 57.0, 102.0, 182.0, -68.0))


@pytest.mark.parametrize("values", [CLOSE, [0.7], [0.7, 0.7], [0.70, 0.71, 0.75, 0.76], [0.5, 0.7000001, 0.7000002]])
def test_axes_without_values_far_off_are_whole(values: list[float]) -> None:
    found = value_ranges(values)
    assert len(found) == (2 if values[0] == 0.5 else 1)
    assert found[-1][1] - found[-1][0] >= 0.01 * max(values), "rounding does not fill an axis"


@pytest.mark.parametrize("along", ["x", "y"])
def test_a_broken_axis_shows_every_value_once(along: str) -> None:
    panels = broken([*CLOSE, 100.0], 6, 4, along)
    limits = [axes.get_xlim() if along == "x" else axes.get_ylim() for axes in panels.parts]
    assert len(limits) == 2
    assert panels.main is panels.parts[0]
    for value in (*CLOSE, 100.0):
        assert sum(low <= value <= high for low, high in limits) == 1
    sizes = [axes.get_position().width if along == "x" else axes.get_position().height for axes in panels.parts]
    assert sizes[0] > 3 * sizes[1]


@pytest.mark.parametrize(("low", "high", "log"), [(1e-6, 3e-6, False), (1e6, 3e9, False), (1e-4, 1e3, True)])
def test_ticks_are_plain_numbers(low: float, high: float, log: bool) -> None:
    figure, axes = canvas()
    if log:
        axes.set_yscale("log")
    axes.set_ylim(low, high)
    plain_axis(axes.yaxis)
    figure.draw_without_rendering()
    texts = [label.get_text() for label in axes.get_yticklabels()]
    assert any(texts)
    assert all(re.fullmatch(r"-?[\d,]*(\.\d+)?", text) for text in texts), texts
    assert axes.yaxis.get_offset_text().get_text() == ""


def test_ticks_of_an_axis_have_as_many_decimals() -> None:
    figure, axes = canvas()
    axes.set_yticks([0.5, 0.75, 1.0])
    plain_axis(axes.yaxis)
    figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.50", "0.75", "1.00"]


@pytest.mark.parametrize("lower", [False, True])
def test_darker_is_better(lower: bool) -> None:
    colors, norm = shades(CLOSE, lower)
    bright = [luminance(colors(norm(value))) for value in CLOSE]
    assert bright == sorted(bright, reverse=not lower)
    assert abs(bright[0] - bright[-1]) > 0.5


def test_shades_show_neither_rounding_nor_only_a_failure() -> None:
    colors, norm = shades([0.7500, 0.7501, 0.7501], False)
    assert abs(luminance(colors(norm(0.7500))) - luminance(colors(norm(0.7501)))) < 0.05
    colors, norm = shades([40.0, 41.0, 42.0, 1e6], True)
    assert luminance(colors(norm(42.0))) - luminance(colors(norm(40.0))) > 0.5
    assert colors(norm(1e6)) == colors(norm(42.0))


def test_shifts_and_levels_keep_marks_apart() -> None:
    assert side_by_side([5, 7, 5, 5], 0.9) == pytest.approx([-0.3, 0.0, 0.0, 0.3])
    assert stacked([0.5, 0.5, 0.7, 0.501], 0.01) == [0, 1, 0, 2]
