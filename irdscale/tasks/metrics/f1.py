"""F1: the harmonic mean of precision and recall."""

import datasets
import evaluate
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """F1 of class 1 (`average="binary"`), or the mean of the classes' F1 (`average="macro"`); 0 where undefined."""

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="Class numbers.", features=classes
        )

    def _compute(self, predictions: list[int], references: list[int], average: str = "binary") -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}
