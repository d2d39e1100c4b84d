"""Relations between a ranking and the samples' properties, against scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from irdscale.report.relations import (
    Relation,
    eta_squared,
    headline,
    larger_probability,
    partial_spearman,
    relations,
    spearman,
)


def numbers(seed: int, count: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three columns that depend on each other, with ties."""
    generator = np.random.default_rng(seed)
    a = generator.integers(0, 15, count)
    b = a + generator.integers(0, 10, count)
    return a, b, a - b + generator.integers(0, 20, count)


def test_rank_statistics_are_those_of_scipy() -> None:
    a, b, c = numbers(0)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-11)
    assert spearman(a, np.ones(40)) is None
    # What is left of the ranks of both after a regression on the ranks held.
    x, y, z = map(stats.rankdata, (a, b, c))
    left = [v - np.polyval(np.polyfit(z, v, 1), z) for v in (x, y)]
    assert partial_spearman(a, b, c) == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-9)
    assert partial_spearman(a, b, b) is None
    classes = [int(v) % 3 for v in c]
    groups = [b[[k == one for k in classes]] for one in range(3)]
    h = stats.kruskal(*groups).statistic
    ties = stats.tiecorrect(stats.rankdata(b))
    assert ties < 1
    assert eta_squared(b, classes) == pytest.approx(h / 39, rel=1e-9), "H is corrected for ties, as the variance is"
    flags = [bool(v > 3) for v in c]
    u = stats.mannwhitneyu(b[flags], b[[not f for f in flags]]).statistic
    assert larger_probability(b, flags) == pytest.approx(u / (sum(flags) * (40 - sum(flags))), rel=1e-12)


def traces(**changes: Any) -> dict[str, Any]:
    known = {"length": [10, 20, 30, 40, 50, 60, 70, 80], "label": [0, 1] * 4, "loss": [1.0, 3, 2, 5, 4, 8, 7, 6]}
    return known | changes


@pytest.mark.parametrize(
    ("trace", "kind", "known", "expected"),
    [
        (
            [8, 7, 6, 5, 4, 3, 2, 1],
            "sequence-classification",
            {},
            "The ranking is largely length in disguise: Spearman -1.00 with length (-1.00 with loss held). It also "
            "follows loss: Spearman -0.86 with loss.",
        ),
        (
            [4, 8, 1, 7, 2, 6, 3, 5],
            "sequence-classification",
            {},
            "The ranking is largely class in disguise: the class explains 76.2 % of the variance of its ranks.",
        ),
        (
            [3, 8, 1, 6, 2, 5, 7, 4],
            "sequence-classification",
            {"loss": [1.0] * 8},
            "There is no sign that the ranking is length or class in disguise",
        ),
        (
            [1.0, 4, 9, 16, 16.5, 9.5, 4.5, 1.5],
            "regression",
            {"label": [0.0, 1, 2, 3, 4, 5, 6, 7], "length": [9] * 8},
            "The ranking is largely distance of the label from the mean in disguise: Spearman -0.98 with",
        ),
    ],
)
def test_headline(trace: list[float], kind: str, known: dict[str, Any], expected: str) -> None:
    assert headline(relations(trace, traces(**known), kind), "ranking").startswith(expected)


def test_a_relation_above_chance_is_not_called_none() -> None:
    rows = 200
    places = np.random.default_rng(0).permutation(rows)
    values = np.arange(rows) + 2.5 * places
    known = {"length": list(range(rows)), "loss": [1.0] * rows, "label": [0, 1] * 100}
    faint = relations(values, known, "sequence-classification")
    assert 0.14 < faint[0].value < 0.3
    said = headline(faint, "ranking")
    assert said.startswith("The ranking follows length a little, more than by chance: Spearman +0.26 with")
    assert "by chance ±0.14. There is no sign that the ranking is class in disguise: the class explains" in said


def test_a_relation_that_another_one_hides_is_not_called_none() -> None:
    """Of no relation with the loss as it is, and a strong one with the length held."""
    hidden = Relation("loss", "Spearman", 0.05, (-0.14, 0.14), 0.0, held=0.4)
    said = headline([hidden], "ranking")
    assert said.startswith("The ranking follows loss a little, more than by chance: Spearman +0.05 with loss (+0.40")
    assert "no sign" not in said


def test_few_samples_prove_nothing() -> None:
    known = {"length": [1, 2, 3, 4, 5], "label": [1, 2, 3, 4, 5], "loss": [1.0, 2, 4, 5, 3]}
    found = relations([2.0, 1, 4, 3, 5], known, "causal-lm")
    assert [(r.name, r.measure) for r in found] == [("length", "Spearman"), ("loss", "Spearman")]
    assert found[0].value == pytest.approx(0.8)
    assert found[0].chance == pytest.approx((-0.98, 0.98))
    assert headline(found, "trace").startswith("There is no sign that the trace is length or loss in disguise")
