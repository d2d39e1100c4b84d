"""What happens between a training's steps: ranks agree, losses are read, the state is saved, the training stops."""

from __future__ import annotations

import json
import time
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback

from irdscale.distributed.ranks import gather_texts, largest_of, rank_and_world
from irdscale.errors import TrainingError
from irdscale.training.checkpoint import digest_seed, load_generators, load_training, save_training
from irdscale.training.control import Paused
from irdscale.training.hf_trainer import SparseTrainer, Training
from irdscale.utils.interrupts import wanted

# Seconds between two syncs (at least one step).
SYNC_S = 1.0
# The last step's state is saved too if at least so many seconds have passed since the state before.
LAST_STATE_S = 30.0


class TrainingCallback(TrainerCallback):
    """Seeds the random streams, stops at a NaN or infinite loss, saves the state.

    A sync reads the losses, which waits for the device, and has all ranks agree on what to do next. It happens about
    once a second, and before a saved state, a rung and the end.
    """

    trainer: SparseTrainer

    def __init__(self, training: Training) -> None:
        self._training, self._alone = training, rank_and_world()[1] == 1
        self._saved = self._synced = time.monotonic()
        self._due = self._pausing = self._interrupted = False
        # Steps until the next sync, and from the last sync to the next.
        self._left = self._between = 1

    def losses(self) -> list[float]:
        """The loss of each step, those of an earlier run first, averaged over the ranks; collective."""
        return [*self._training.losses, *self.trainer.losses.means()]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        # The dropout stream depends on the seed alone, not on random numbers drawn before (for the mask, say).
        rank, seed = rank_and_world()[0], self._training.seed
        torch.manual_seed(seed if rank == 0 else digest_seed(rank, seed))
        if self._training.done:
            assert self._training.state is not None
            load_training(self._training.state, self._model, self.trainer.optimizer, self._training.done)
        self._synced = time.monotonic()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._training.done and self.trainer.state.global_step == 0:
            assert self._training.state is not None
            load_generators(self._training.state, self._training.done)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Sync if it is time to. DeepSpeed has made its optimizer step by now, even from a bad loss."""
        step = self.trainer.step + 1
        self._left -= 1
        must = self._left <= 0 or step == self._training.steps or step in self._training.control.rungs
        # A single rank need not agree with others, so it reacts at once.
        if must or self._alone:
            flags = self._flags()
            if must or any(flags):
                self._sync(flags)

    def _flags(self) -> tuple[bool, bool, bool]:
        """Whether a state is due, a pause was requested, and a signal came (a requested pause goes first)."""
        saving, pausing = self._training.state is not None, self._training.control.pausing
        due = saving and time.monotonic() - self._saved >= 60 * self._training.train.save_minutes
        return due, rank_and_world()[0] == 0 and pausing(), saving and wanted() and not pausing()

    def _sync(self, flags: tuple[bool, bool, bool]) -> None:
        """Read the losses, combine the ranks' flags, and set the step of the next sync; collective.

        Raises:
            TrainingError: a loss of any rank is NaN or infinite.
        """
        bad = self.trainer.losses.read()
        seconds = SYNC_S if self._training.state is None else min(SYNC_S, 60 * self._training.train.save_minutes)
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
        self._left = self._between = between

    def on_step_end(self, *_: Any, **__: Any) -> None:
        training, step = self._training, self.trainer.step
        training.control.advance(1)
        for seen in self.trainer.losses.take_unseen():
            if training.control.seen is not None:
                training.control.seen(*seen)
        last = step == training.steps
        if last and not self._interrupted and not self._long_unsaved():
            return
        if step in training.control.rungs:
            training.control.at_rung(step)
        if training.state is not None and (last or self._due or self._pausing or self._interrupted):
            self._due = False
            save_training(training.state, self._model, self.trainer.optimizer, step, training.made_by, self.losses())
            self._saved = time.monotonic()
            if self._interrupted:
                raise KeyboardInterrupt
            if self._pausing and not last:
                raise Paused(f"paused after step {step}")
        if self._left == self._between:
            # The time of a rung or of saving does not count as time of a step.
            self._synced = time.monotonic()

    def _long_unsaved(self) -> bool:
        """Whether any rank's last saved state is older than `LAST_STATE_S`; collective."""
        return self._training.state is not None and largest_of([time.monotonic() - self._saved >= LAST_STATE_S])[0] > 0

    @property
    def _model(self) -> nn.Module:
        return cast(nn.Module, self.trainer.model)
