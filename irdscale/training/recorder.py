"""Writes a training's metrics while it runs: to metrics.jsonl and to the trackers of `train.report_to`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irdscale.config.schema import TrainConfig
from irdscale.distributed.ranks import failing_together, rank_and_world
from irdscale.training.metrics_file import MetricsFile
from irdscale.training.step_metrics import StepMetrics
from irdscale.training.trackers import Trackers

if TYPE_CHECKING:
    from irdscale.tasks import Task


@dataclass(frozen=True)
class Records:
    """Where the metrics of a training go.

    Attributes:
        file: the JSONL file, one line per optimizer step.
        name: name of the run in trackers.
        tensorboard: folder of TensorBoard's files.
    """

    file: Path
    name: str
    tensorboard: Path


class Recorder:
    """Records one training; rank 0 writes, and all ranks call the methods together.

    Args:
        records: None to record nothing.
        task: names the selection metric.
        done: steps that an earlier run made.
    """

    def __init__(self, records: Records | None, train: TrainConfig, task: Task, done: int) -> None:
        self._records, self._train, self._task, self._done = records, train, task, done
        self._writes = records is not None and rank_and_world()[0] == 0
        self._file: MetricsFile | None = None
        self._trackers: Trackers | None = None

    def begin(self, args: Any, state: Any, control: Any, model: Any) -> None:
        """Open the file and start the trackers.

        Raises:
            InputError: a tracker cannot start.
            RunError: the file cannot be written.
        """
        if self._records is None:
            return
        with failing_together():
            if self._writes:
                self._file = MetricsFile(self._records.file, self._done)
                self._trackers = Trackers(list(self._train.report_to), self._records.tensorboard, self._done)
                self._trackers.begin(args, state, control, model)

    def add(self, steps: list[StepMetrics], seconds: float, evaluated: float | None) -> None:
        """Record steps.

        Args:
            seconds: mean seconds of one of these steps.
            evaluated: selection metric after the last of these steps; None without an evaluation.

        Raises:
            RunError: the file cannot be written.
        """
        if self._records is None or not steps:
            return
        with failing_together():
            if self._file is not None and self._trackers is not None:
                lines = [self._line(step, steps, seconds) for step in steps]
                if evaluated is not None:
                    lines[-1]["metric"] = evaluated if math.isfinite(evaluated) else None
                self._file.append(lines)
                for line in lines:
                    self._trackers.log(line["step"], self._named(line))

    def _line(self, metrics: StepMetrics, steps: list[StepMetrics], seconds: float) -> dict[str, Any]:
        # A device works through several steps before the host hears of one, so a rate is the mean of these steps.
        tokens = sum(step.tokens for step in steps) / len(steps)
        return {
            "step": metrics.step,
            "loss": metrics.loss,
            "learning_rate": metrics.learning_rate,
            "grad_norm": metrics.grad_norm,
            "samples_per_second": round(self._train.batch_size / seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1) if tokens else None,
        }

    def _named(self, line: dict[str, Any]) -> dict[str, float]:
        """The metrics of a line by the names of the Trainer."""
        names = {"metric": f"eval_{self._task.metric}"}
        return {names.get(key, key): value for key, value in line.items() if key != "step" and value is not None}

    def sync(self) -> None:
        """Have the lines on disk before a state of the same step."""
        with failing_together():
            if self._file is not None:
                self._file.sync()

    def end(self) -> None:
        """End the trackers' runs."""
        if self._trackers is not None:
            self._trackers.end()
