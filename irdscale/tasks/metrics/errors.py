"""Standard errors of metrics: by how much another draw of as many samples would change them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

# The error of a standard error by so many resamples is 3 % of it.
RESAMPLES = 500


def of_share(share: float, samples: int) -> float:
    """Of a share of samples, such as accuracy: that of a binomial count."""
    return math.sqrt(share * (1 - share) / samples)


def of_ratio(numerators: Any, denominators: Any) -> float:
    """Of a ratio of two sums over samples [N], such as a mean loss by token: the linearised (delta) form."""
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    samples = len(above)
    if samples < 2:
        return 0.0
    residual = above - below * (above.sum() / below.sum())
    return math.sqrt(float((residual**2).sum()) * samples / (samples - 1)) / float(below.sum())


def standard_errors(names: tuple[str, ...], kind: str, num_labels: int, logits: Any, labels: Any) -> dict[str, float]:
    """Of the metrics of a model's output; see `irdscale.tasks.metrics.compute`.

    Of accuracy in closed form, of the others by `RESAMPLES` bootstrap samples, the same ones in every call.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    logits = logits.reshape(len(labels), num_labels)
    if kind == "regression":
        return {name: _of_correlation(name, logits[:, 0].astype(float), labels) for name in names}
    predictions = logits.argmax(axis=1)
    return {name: _of_classes(name, num_labels, predictions, labels) for name in names}


def _of_classes(name: str, num_labels: int, predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score, matthews_corrcoef

    if name == "accuracy":
        return of_share(float((predictions == labels).mean()), len(labels))
    average = "binary" if num_labels == 2 else "macro"
    score: Callable[..., float] = {
        "f1": functools.partial(f1_score, average=average, zero_division=0),
        "matthews_correlation": matthews_corrcoef,
    }[name]
    # A resample of rows is a multinomial draw of how often each pair of classes is in it.
    pairs, counts = np.unique(np.stack([labels, predictions]), axis=1, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(labels), counts / len(labels), RESAMPLES)
    return float(np.std([score(*pairs, sample_weight=weights) for weights in drawn], ddof=1))


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
