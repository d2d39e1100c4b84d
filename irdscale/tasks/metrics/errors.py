"""Standard errors of metrics: how much another draw of as many samples would change them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# The relative error of a standard error from 500 resamples is 3 %.
RESAMPLES = 500


def of_share(share: float, samples: int) -> float:
    """The standard error of a share of samples, such as accuracy: that of a binomial count."""
    return math.sqrt(share * (1 - share) / samples)


def of_ratio(numerators: Any, denominators: Any) -> float:
    """The standard error of a ratio of two sums over samples [N], such as a loss per token, by the delta method."""
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    samples = len(above)
    if samples < 2:
        return 0.0
    residual = above - below * (above.sum() / below.sum())
    return math.sqrt(float((residual**2).sum()) * samples / (samples - 1)) / float(below.sum())


def standard_errors(names: tuple[str, ...], kind: str, num_labels: int, logits: Any, labels: Any) -> dict[str, float]:
    """Standard errors of the metrics of a model's output; see `irdscale.tasks.metrics.compute`.

    Accuracy has a closed form; the others use `RESAMPLES` bootstrap samples, the same ones in every call.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    logits = logits.reshape(len(labels), num_labels)
    if kind == "regression":
        return {name: _of_correlation(name, logits[:, 0].astype(float), labels) for name in names}
    predictions = logits.argmax(axis=1)
    return {name: _of_classes(name, num_labels, predictions, labels) for name in names}


def _of_classes(name: str, num_labels: int, predictions: np.ndarray, labels: np.ndarray) -> float:
    if name == "accuracy":
        return of_share(float((predictions == labels).mean()), len(labels))
    counts = np.bincount(num_labels * labels.astype(int) + predictions, minlength=num_labels**2)
    # A resample of rows draws the counts of the pairs of classes from a multinomial distribution.
    drawn = np.random.default_rng(0).multinomial(len(labels), counts / len(labels), RESAMPLES)
    return float(np.std(of_counts(name, drawn.reshape(-1, num_labels, num_labels)), ddof=1))


def of_counts(name: str, counts_RCC: np.ndarray) -> np.ndarray:
    """F1 or Matthews correlation [R] from the counts of each class [R, C, .] predicted as each [R, ., C].

    Equal to scikit-learn's, which takes seconds for all resamples.
    """
    right_RC = np.diagonal(counts_RCC, axis1=1, axis2=2).astype(float)
    true_RC, predicted_RC = (counts_RCC.sum(axis).astype(float) for axis in (2, 1))
    if name == "f1":
        f1_RC = _ratio(2 * right_RC, true_RC + predicted_RC)
        if counts_RCC.shape[1] == 2:
            return f1_RC[:, 1]
        # Classes without samples and predictions in a resample do not count.
        return _ratio(f1_RC.sum(1), (true_RC + predicted_RC > 0).sum(1))
    total_R = true_RC.sum(1)
    covariance_R = right_RC.sum(1) * total_R - (true_RC * predicted_RC).sum(1)
    spread_R = (total_R**2 - (predicted_RC**2).sum(1)) * (total_R**2 - (true_RC**2).sum(1))
    return _ratio(covariance_R, np.sqrt(spread_R))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient; 0 where the denominator is 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below > 0)


def _of_correlation(name: str, predictions: np.ndarray, values: np.ndarray) -> float:
    from scipy.stats import rankdata

    generator = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        rows = generator.integers(len(values), size=len(values))
        pair = [side[rows] for side in (predictions, values)]
        a, b = (rankdata(side) for side in pair) if name == "spearman" else pair
        constant = np.ptp(a) == 0 or np.ptp(b) == 0
        found.append(0.0 if constant else float(np.corrcoef(a, b)[0, 1]))
    return float(np.std(found, ddof=1))
