"""The metrics, as `evaluate` metrics of this package's own table, which need no hub."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from irdscale.errors import InputError, RunError, TrainingError


@functools.cache
def load_metric(name: str) -> Any:
    """The `evaluate.Metric` called `name`.

    Raises:
        RunError: `evaluate` cannot write its folder in the Hugging Face cache.
    """
    from irdscale.tasks.metrics.scores import Score

    try:
        return Score(name, keep_in_memory=True)
    except OSError as error:
        raise RunError(f"cannot load the metric {name}: {error} (HF_HOME must be a writable folder)") from error


def fitting_metrics(
    kind: str, chosen: str | None, reported: tuple[str, ...], valid: tuple[str, ...]
) -> tuple[str, ...]:
    """The metrics to report, the main one first.

    Args:
        chosen: `task.metric`, or None for the first of `reported`.
        reported: the task's usual metrics.
        valid: those that fit `kind`.

    Raises:
        InputError: `chosen` does not fit.
    """
    if chosen is None:
        return reported
    if chosen not in valid:
        raise InputError(f"found {chosen!r} with kind {kind!r}", f"one of {', '.join(valid)}", "task.metric")
    return (chosen, *(name for name in reported if name != chosen))


def compute(names: tuple[str, ...], kind: str, num_labels: int, logits: Any, labels: Any) -> dict[str, float]:
    """The metrics of a model's output.

    Args:
        names: metrics that fit `kind`.
        logits: [N, num_labels], or [N] for regression.
        labels: [N], class numbers or values.

    Raises:
        TrainingError: a logit is NaN or infinite.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    logits = logits.reshape(len(labels), num_labels)
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if broken.size:
        raise TrainingError(
            f"the model's output for sample {broken[0]} is not finite ({broken.size} of {len(labels)} samples)"
        )
    predictions = logits[:, 0].astype(np.float64) if kind == "regression" else logits.argmax(axis=1)
    values: dict[str, float] = {}
    for name in names:
        extra = {"average": "binary" if num_labels == 2 else "macro"} if name == "f1" else {}
        values |= load_metric(name).compute(predictions=predictions, references=labels, **extra)
    return values
