"""Evaluations on the selection split during a training, and the numbers of the best one (`train.keep: best`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from irdscale.config.schema import TrainConfig
from irdscale.training.checkpoint import Best, put_values, trained_values
from irdscale.training.evaluate import evaluate_model

if TYPE_CHECKING:
    from irdscale.tasks import Task


@dataclass
class Evaluations:
    """The evaluations of one training; collective.

    Attributes:
        best: the best evaluation so far with the numbers of its step, for `train.keep: best`; None before the first.
    """

    model: nn.Module
    task: Task
    train: TrainConfig
    steps: int
    best: Best | None = None

    def due(self, step: int) -> bool:
        """Whether this step has an evaluation: every `train.eval_steps`, and the last."""
        every = self.train.eval_steps
        return every is not None and (step % every == 0 or step == self.steps)

    def measure(self, step: int, optimizer: Any) -> float:
        """The selection metric after `step` steps; keeps the numbers of the first best.

        A metric that is no number, such as the correlation of constant predictions, is not the best.
        """
        found = evaluate_model(self.model, self.task, self.task.selection, self.train.eval_batch_size)
        metric = found[self.task.metric]
        if self.train.keep == "best" and self._is_better(metric):
            self.best = Best(step, metric, trained_values(self.model, optimizer))
        return metric

    def _is_better(self, metric: float) -> bool:
        if self.best is None or not math.isfinite(metric):
            return math.isfinite(metric)
        return metric < self.best.metric if self.task.lower_is_better else metric > self.best.metric

    def keep(self) -> int:
        """Give the model the numbers that the training keeps; returns their step."""
        if self.best is None or self.best.step == self.steps:
            return self.steps
        put_values(self.model, self.best.values)
        return self.best.step
