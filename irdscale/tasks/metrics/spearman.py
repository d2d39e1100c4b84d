"""Spearman rank correlation of predicted and true values."""

import datasets
import evaluate
import numpy as np
from scipy.stats import spearmanr


class Spearman(evaluate.Metric):
    """Spearman's rho, from -1 to 1; 0 where all predictions or all references are equal."""

    def _info(self) -> evaluate.MetricInfo:
        values = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("float64")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="Numbers.", features=values)

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        constant = np.ptp(predictions) == 0 or np.ptp(references) == 0
        return {"spearman": 0.0 if constant else float(spearmanr(predictions, references).statistic)}
