"""Where a loss began and ended, and what is said of one that rose."""

from __future__ import annotations

import pytest

from irdscale.training.loss_trend import loss_trend, rise_warning, rise_warnings


@pytest.mark.parametrize(
    ("losses", "began", "ended", "rose"),
    [
        ([2.0, 1.0], 2.0, 1.0, False),
        ([1.0, 2.0], 1.0, 2.0, True),
        ([1.0, 9.0, 9.0, 9.0, 1.0], 1.0, 1.0, False),
        # Parts of three of fifteen.
        ([1.0, 2.0, 3.0, *[0.0] * 9, 3.0, 4.0, 5.0], 2.0, 4.0, True),
        # The end is higher, by less than the spread of three losses can tell: its error is 0.82.
        ([1.0, 2.0, 3.0, *[0.0] * 9, 1.5, 2.5, 3.5], 2.0, 2.5, False),
    ],
)
def test_trends(losses: list[float], began: float, ended: float, rose: bool) -> None:
    assert loss_trend(losses) == {"began": pytest.approx(began), "ended": pytest.approx(ended), "rose": rose}


def test_one_step_has_no_trend() -> None:
    assert loss_trend([]) is loss_trend([3.0]) is None


def test_what_is_said() -> None:
    trends = {"a": loss_trend([1.0, 3.0]), "b": loss_trend([1.0, 9.0]), "c": loss_trend([2.0, 1.0]), "d": None}
    assert trends["a"] is not None
    assert rise_warning(trends["a"]).startswith("The loss rose from 1 to 3: train.learning_rate may")
    (said,) = rise_warnings(trends)
    assert said.startswith("The loss rose in 2 of 3 trainings, most in b: from 1 to 9; ")
    assert rise_warnings({"c": trends["c"], "d": None}) == []
