"""Matthews correlation of predicted and true classes."""

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef


class MatthewsCorrelation(evaluate.Metric):
    """Matthews correlation, from -1 to 1; 0 where all predictions are one class."""

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="Class numbers.", features=classes
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
