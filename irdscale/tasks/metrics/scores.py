"""Metrics computed by scikit-learn and SciPy, in the form of `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def _correlation(of: Callable[..., Any], references: Any, predictions: Any) -> float:
    """The correlation `of` predictions and references; 0 where either is constant, as for Matthews correlation."""
    constant = np.ptp(predictions) == 0 or np.ptp(references) == 0
    return 0.0 if constant else float(of(predictions, references).statistic)


# Name -> the type of predictions and references, and the function of references and predictions.
SCORES: dict[str, tuple[str, Callable[..., float]]] = {
    "accuracy": ("int64", accuracy_score),
    "f1": ("int64", partial(f1_score, zero_division=0)),
    "matthews_correlation": ("int64", matthews_corrcoef),
    "pearson": ("float64", partial(_correlation, pearsonr)),
    "spearman": ("float64", partial(_correlation, spearmanr)),
}


class Score(evaluate.Metric):
    """The metric named by `config_name`; options such as `average` go to its function."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value(SCORES[self.config_name][0])
        features = datasets.Features({"predictions": value, "references": value})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="Numbers.", features=features)

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        return {self.config_name: float(SCORES[self.config_name][1](references, predictions, **options))}
