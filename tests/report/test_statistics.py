"""Intervals and paired differences against scipy and against arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from irdscale.report.statistics import interval, paired


def test_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, and 4.302653 is the 97.5 % point of t with 2 degrees of freedom.
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["low"] == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-6)
    assert found["high"] == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-6)
    assert found["n"] == 3


def test_interval_is_scipys() -> None:
    values = np.random.default_rng(0).normal(3.4, 0.02, 7)
    expected = ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = interval(values)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_too_few_for_an_interval() -> None:
    assert interval([]) == {"mean": None, "low": None, "high": None, "n": 0}
    assert interval([None, 0.5, None]) == {"mean": 0.5, "low": None, "high": None, "n": 1}
    assert interval([0.5, 0.7]) == {"mean": 0.6, "low": None, "high": None, "n": 2}
    assert interval([0.5, 0.5, 0.5]) == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 3}
    two = paired({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.3}, lower_is_better=False)
    assert (two["low"], two["high"], two["p"], two["wins"]) == (None, None, None, 2)


def test_intervals_end_where_the_metric_does() -> None:
    values = [0.99, 1.0, 0.9]
    assert interval(values)["high"] > 1.05
    inside = interval(values, (0.0, 1.0))
    assert inside["high"] == 1.0
    assert inside["low"] == interval(values)["low"]
    assert interval([-0.9, -1.0, 0.2], (-1.0, 1.0))["low"] == -1.0
    assert interval([1.2, 9.0, 1.1], (1.0, float("inf")))["low"] == 1.0
    assert interval([1.0, 1.0, 1.0], (0.0, 1.0))["high"] == 1.0
    apart = paired({0: 1.0, 1: 0.1, 2: 1.0}, {0: 0.0, 1: 0.0, 2: 0.1}, False, (0.0, 1.0))
    assert apart["high"] == 1.0
    assert paired({0: 1.0, 1: 0.1, 2: 1.0}, {0: 0.0, 1: 0.0, 2: 0.1}, False)["high"] > 1.5


def test_paired_is_scipys() -> None:
    generator = np.random.default_rng(1)
    a = generator.normal(0.7, 0.05, 6)
    b = a - generator.normal(0.01, 0.01, 6)
    expected = ttest_rel(a, b)
    found = paired(dict(enumerate(a)), dict(enumerate(b)), lower_is_better=False)
    bounds = expected.confidence_interval(0.95)
    assert found["p"] == pytest.approx(expected.pvalue, rel=1e-10)
    assert (found["low"], found["high"]) == pytest.approx((bounds.low, bounds.high), rel=1e-10)
    assert (found["wins"], found["losses"]) == (int((a > b).sum()), int((a < b).sum()))


def test_paired_takes_the_seeds_that_both_have() -> None:
    reference = {0: 0.70, 1: 0.72, 2: None, 3: 0.60, 5: 0.9}
    other = {5: None, 3: 0.60, 2: 0.1, 1: 0.73, 0: 0.65, 9: 0.1}
    found = paired(reference, other, lower_is_better=False)
    assert found["mean"] == pytest.approx((0.05 - 0.01 + 0.0) / 3)
    assert (found["n"], found["wins"], found["losses"], found["ties"]) == (3, 1, 1, 1)
    turned = paired(reference, other, lower_is_better=True)
    assert (turned["wins"], turned["losses"], turned["ties"]) == (1, 1, 1)
    assert turned["mean"] == found["mean"]


def test_lower_is_better_turns_wins_and_not_differences() -> None:
    found = paired({0: 3.1, 1: 3.2, 2: 3.0}, {0: 3.3, 1: 3.3, 2: 2.9}, lower_is_better=True)
    assert found["mean"] == pytest.approx(-0.2 / 3)
    assert (found["wins"], found["losses"]) == (2, 1)


def test_equal_differences_have_no_spread_in_spite_of_rounding() -> None:
    reference, other = {0: 0.3, 1: 0.4, 2: 1.1}, {0: 0.2, 1: 0.3, 2: 1.0}
    assert len({reference[s] - other[s] for s in reference}) > 1
    found = paired(reference, other, lower_is_better=False)
    assert found["low"] == found["mean"] == found["high"] == pytest.approx(0.1)
    assert found["p"] is None


def test_nothing_to_pair() -> None:
    for other in ({}, {0: None}, {1: 0.5}):
        found = paired({0: 0.5}, other, lower_is_better=False)
        assert found == {"mean": None, "low": None, "high": None, "n": 0, "wins": 0, "losses": 0, "ties": 0, "p": None}
    one = paired({0: 0.75}, {0: 0.5}, lower_is_better=False)
    assert one == {"mean": 0.25, "low": None, "high": None, "n": 1, "wins": 1, "losses": 0, "ties": 0, "p": None}
