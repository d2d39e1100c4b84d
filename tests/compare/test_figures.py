"""Figures of a comparison: nothing squashed, nothing hidden, nothing without a message."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from matplotlib.collections import PathCollection

from irdscale.compare.figures import differences, score_by_parameters, scores, selection_by_rate
from tests.compare.fake import ALL, around, everything, study

CLOSE = {name: around(0.72 - 0.01 * i) for i, name in enumerate(("ird", "fish", "reverse", "lora"))}
FAR = {**CLOSE, "full": [9.0] * 5}


def panel(figure: Any, value: float, axis: str) -> tuple[Any, float, float]:
    """The axes that show a value, and their limits."""
    for axes in figure.axes:
        low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
        if low <= value <= high:
            return axes, low, high
    raise AssertionError(f"no axes show {value}")


@pytest.mark.parametrize(
    ("draw", "axis", "value", "far", "span"),
    [
        (scores, "x", 0.70, 9.0, 0.03),
        (score_by_parameters, "y", 0.70, 9.0, 0.03),
        (differences, "x", 0.01, -8.28, 0.03),
        (selection_by_rate, "y", 0.70, 9.01, 0.05),
    ],
)
def test_a_far_method_does_not_squash_the_others(draw: Any, axis: str, value: float, far: float, span: float) -> None:
    figure = draw(study(FAR))
    figure.draw_without_rendering()
    main, low, high = panel(figure, value, axis)
    assert span > 0.35 * (high - low)
    size = main.get_position()
    assert (size.width if axis == "x" else size.height) > 0.4
    assert panel(figure, far, axis)[0] is not main, "the far method is shown in a part of its own"


@pytest.mark.parametrize("draw", [scores, score_by_parameters, differences, selection_by_rate])
def test_ticks_are_plain_numbers(draw: Any) -> None:
    compared = everything()
    for method in compared["methods"]:
        for point, rate in zip(method["grid"], (1e-5, 3e-5, 1e-4), strict=True):
            point["learning_rate"] = rate
    figure = draw(compared)
    figure.draw_without_rendering()
    texts = [
        label.get_text()
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True))
    ]
    assert any(texts)
    assert not [text for text in texts if re.search(r"\d[eE]|×|math", text)]


def test_seeds_of_equal_scores_are_all_seen() -> None:
    figure = scores(study({"ird": [0.7] * 5, "fish": [0.6] * 5}))
    assert figure is not None
    dots = [found for found in figure.axes[0].collections if isinstance(found, PathCollection)]
    places = [tuple(place) for found in dots for place in found.get_offsets()]
    assert len(set(places)) == len(places) == 10


def test_points_at_one_learning_rate_are_beside_each_other() -> None:
    figure = selection_by_rate(study(dict.fromkeys(ALL, [0.7] * 5)))
    assert figure is not None
    firsts = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert len(firsts) == len(ALL)
    assert all(b > a for a, b in itertools.pairwise(sorted(firsts)))
    lasts = [line.get_xdata()[1] for line in figure.axes[0].lines]
    assert max(firsts) < min(lasts), "rates stay apart"


def test_figures_with_nothing_to_show_are_left_out() -> None:
    one = study({"ird": around(0.7), "linear_probe": around(0.6)})
    assert score_by_parameters(one) is None, "one method trains parameters"
    for method in one["methods"]:
        method["grid"] = method["grid"][1:2]
    assert selection_by_rate(one) is None, "one learning rate"
    alone = study({"ird": around(0.7)})
    assert differences(alone) is None
    assert scores(study({"ird": [None], "fish": [None]})) is None
