"""Callbacks by which a caller follows, measures and pauses a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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
        seen: called for each step, once its loss is read, with the number of steps made, the loss of this rank's last
            forward pass, and the learning rate.
        resumed: called first, with the number of steps that an earlier run made; `advance` unless given.
    """

    advance: Callable[..., None] = lambda n=1: None
    pausing: Callable[[], bool] = lambda: False
    rungs: frozenset[int] = frozenset()
    at_rung: Callable[[int], None] = lambda step: None
    seen: Callable[[int, float, float], None] | None = None
    resumed: Callable[[int], None] | None = None
