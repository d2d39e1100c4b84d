"""The metrics that scikit-learn and SciPy compute, as `evaluate` takes them."""

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
    """Of predictions and references; 0 where all of one are equal, as for Matthews correlation."""
    constant = np.ptp(predictions) == 0 or np.ptp(references) == 0
    return 0.0 if constant else float(of(predictions, references).statistic)


# Name -> the type of predictions and references, and what computes the metric from references and predictions.
SCORES: dict[str, tuple[str, Callable[..., float]]] = {
    "accuracy": ("int64", accuracy_score),
    "f1": ("int64", partial(f1_score, zero_division=0)),
    "matthews_correlation": ("int64", matthews_corrcoef),
    "pearson": ("float64", partial(_correlation, pearsonr)),
    "spearman": ("float64", partial(_correlation, spearmanr)),
}


class Score(evaluate.Metric):
    """The metric that the configuration's name says; options go to what computes it, such as `average` of F1."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value(SCORES[self.config_name][0])
        features = datasets.Features({"predictions": value, "references": value})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="Numbers.", features=features)

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        return {self.config_name: float(SCORES[self.config_name][1](references, predictions, **options))}
