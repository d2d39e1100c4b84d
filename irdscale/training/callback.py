"""What happens between a training's steps: ranks agree, losses are read, metrics recorded, states saved, or a stop."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback

from irdscale.distributed.ranks import gather_texts, largest_of, rank_and_world
from irdscale.errors import TrainingError
from irdscale.training.checkpoint import digest_seed, load_generators, load_training, save_training
from irdscale.training.control import Paused
from irdscale.training.evaluations import Evaluations
from irdscale.training.hf_trainer import SparseTrainer, Training
from irdscale.training.recorder import Recorder
from irdscale.utils.interrupts import wanted

# Seconds between two syncs (at least one step).
SYNC_S = 1.0
# The last step's state is saved too if at least so many seconds have passed since the state before.
LAST_STATE_S = 30.0


class TrainingCallback(TrainerCallback):
    """Seeds the random streams, stops at a NaN or infinite loss, evaluates, records metrics, saves the state.

    A sync reads the losses, which waits for the device, and has all ranks agree on what to do next. It happens about
    once a second, and before an evaluation, a saved state, a rung and the end.

    Attributes:
        trainer: the Trainer, set once it exists.
    """

    trainer: SparseTrainer

    def __init__(self, training: Training, evaluations: Evaluations, recorder: Recorder) -> None:
        self.training, self._alone = training, rank_and_world()[1] == 1
        self._evaluations, self.recorder = evaluations, recorder
        self._saved = self._synced = time.monotonic()
        self._due = self._pausing = self._interrupted = False
        # Steps until the next sync, and from the last sync to the next.
        self._left = self._between = 1
        self._seconds = 1.0

    def losses(self) -> list[float]:
        """The loss of each step that was read, those of an earlier run first, averaged over the ranks."""
        return [*self.training.losses, *self.trainer.losses.means()]

    def on_train_begin(self, args: Any, state: Any, control: Any, **__: Any) -> None:
        self.recorder.begin(args, state, control, self._model)
        # The dropout stream depends on the seed alone, not on random numbers drawn before (for the mask, say).
        rank, seed = rank_and_world()[0], self.training.seed
        torch.manual_seed(seed if rank == 0 else digest_seed(rank, seed))
        if self.training.done:
            assert self.training.state is not None
            load_training(self.training.state, self._model, self.trainer.optimizer, self.training.done)
        self._synced = time.monotonic()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.training.done and self.trainer.state.global_step == 0:
            assert self.training.state is not None
            load_generators(self.training.state, self.training.done)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Sync if it is time to. DeepSpeed has made its optimizer step by now, even from a bad loss."""
        step = self.trainer.step + 1
        self._left -= 1
        last, evaluated = step == self.training.steps, self._evaluations.due(step)
        must = self._left <= 0 or last or evaluated or step in self.training.control.rungs
        # A single rank need not agree with others, so it reacts at once.
        if must or self._alone:
            flags = self._flags()
            if must or any(flags):
                self._sync(flags)

    def _flags(self) -> tuple[bool, bool, bool]:
        """Whether a state is due, a pause was requested, and a signal came (a requested pause goes first)."""
        saving, pausing = self.training.state is not None, self.training.control.pausing
        due = saving and time.monotonic() - self._saved >= 60 * self.training.train.save_minutes
        return due, rank_and_world()[0] == 0 and pausing(), saving and wanted() and not pausing()

    def _sync(self, flags: tuple[bool, bool, bool]) -> None:
        """Read the losses, combine the ranks' flags, and set the step of the next sync; collective.

        Raises:
            TrainingError: a loss of any rank is NaN or infinite.
        """
        bad = self.trainer.losses.read()
        seconds = SYNC_S if self.training.state is None else min(SYNC_S, 60 * self.training.train.save_minutes)
        of_step = max(time.monotonic() - self._synced, 1e-6) / (self._between - max(0, self._left))
        failed, *agreed, between = largest_of([bad is not None, *flags, max(1, int(seconds / of_step))])
        self._due, self._pausing, self._interrupted = map(bool, agreed)
        if failed:
            texts = gather_texts(json.dumps(bad))
            # One rank's bad loss makes the next step of every rank bad: the earliest one is the cause.
            _, rank, text = min(
                (found[0], rank, found[1]) for rank, found in enumerate(map(json.loads, texts)) if found
            )
            raise TrainingError(text if len(texts) == 1 else f"rank {rank}: {text}")
        self.trainer.losses.average()
        self._left, self._between, self._seconds = between, between, of_step

    def on_step_end(self, *_: Any, **__: Any) -> None:
        training, step = self.training, self.trainer.step
        due = self._evaluations.due(step)
        self._record(self._evaluations.measure(step, self.trainer.optimizer) if due else None)
        training.control.advance(1)
        last = step == training.steps
        if last and not self._interrupted and not self._long_unsaved():
            return
        if step in training.control.rungs:
            training.control.at_rung(step)
        if training.state is not None and (last or self._due or self._pausing or self._interrupted):
            self._due = False
            self._save(training.state, step)
            self._saved = time.monotonic()
            if self._interrupted:
                raise KeyboardInterrupt
            if self._pausing and not last:
                raise Paused(f"paused after step {step}")
        if self._left == self._between:
            # The time of a rung or of saving does not count as time of a step.
            self._synced = time.monotonic()

    def _record(self, evaluated: float | None) -> None:
        """Hand on the metrics of the steps that were read; a sync came before an evaluation."""
        steps, seen = self.trainer.losses.take_unseen(), self.training.control.seen
        self.recorder.add(steps, self._seconds, evaluated)
        for metrics in steps:
            if seen is not None:
                seen(metrics.step, metrics.loss, metrics.learning_rate)

    def _save(self, folder: Path, step: int) -> None:
        training, optimizer = self.training, self.trainer.optimizer
        self.recorder.sync()
        best = self._evaluations.best
        save_training(folder, self._model, optimizer, step, training.made_by, self.losses(), best)

    def _long_unsaved(self) -> bool:
        """Whether any rank's last saved state is older than `LAST_STATE_S`; collective."""
        return self.training.state is not None and largest_of([time.monotonic() - self._saved >= LAST_STATE_S])[0] > 0

    @property
    def _model(self) -> nn.Module:
        return cast(nn.Module, self.trainer.model)
