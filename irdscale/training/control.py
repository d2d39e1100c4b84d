"""Callbacks by which a caller follows, measures and pauses a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from irdscale.utils.progress import Advance

# Weight of the losses before in the smoothed loss of a step.
SMOOTHING = 0.9


class Paused(Exception):  # noqa: N818 - nothing went wrong
    """The training paused on request. Its state is saved; the same call continues it."""


@dataclass(frozen=True)
class Control:
    """Callbacks of a training.

    Attributes:
        advance: called on each rank with the number of steps just made.
        pausing: called on rank 0 before each step (about once a second with several ranks); true saves the state
            and raises `Paused`.
        rungs: numbers of steps after which every rank calls `at_rung`; the last step is not one of them.
        at_rung: called with the number of steps made; collective.
        seen: called for each step, once its loss is read, with the number of steps made, the loss (mean over passes
            and ranks), and the learning rate; before `advance` of the step at which it is read.
        resumed: called first, with the number of steps that an earlier run made; `advance` unless given.
        kept: called at the end of a training with `train.keep: best`, with the step whose numbers the model now has.
    """

    advance: Callable[..., None] = lambda n=1: None
    pausing: Callable[[], bool] = lambda: False
    rungs: frozenset[int] = frozenset()
    at_rung: Callable[[int], None] = lambda step: None
    seen: Callable[[int, float, float], None] | None = None
    resumed: Callable[[int], None] | None = None
    kept: Callable[[int], None] = lambda step: None


class SmoothedLoss:
    """Exponential mean of the losses of a training's steps.

    Attributes:
        value: the mean; None before the first loss.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self._sum = self._weight = 0.0

    def add(self, loss: float) -> None:
        """Add the loss of the next step."""
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self.value = self._sum / self._weight


def shown(advance: Advance) -> Control:
    """Show steps and smoothed loss in a progress bar, by its `advance`."""
    smoothed = SmoothedLoss()

    def step(n: int = 1) -> None:
        advance(n, loss=smoothed.value)

    return Control(
        step,
        seen=lambda step, loss, rate: smoothed.add(loss),
        resumed=partial(advance, earlier=True),
    )
