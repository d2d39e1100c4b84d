"""Interrupts after which a run can save its state: Ctrl-C, SIGTERM, or a cluster that takes its resources back.

Inside `deferred`, a signal is only recorded, and the run calls `wanted` at points where it can save. Elsewhere, a
signal raises `KeyboardInterrupt` at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Seconds in which repeated signals count as one: launchers and terminals may send a signal several times.
AGAIN_S = 5.0


class Interrupted(KeyboardInterrupt):
    """A run was interrupted.

    Attributes:
        saved: whether the same call can resume from its folder.
    """

    def __init__(self, saved: bool) -> None:
        super().__init__()
        self.saved = saved


class _State:
    """The interrupts of this process."""

    noted: float | None = None
    depth = 0
    asked: Callable[[], bool] | None = None


def wanted() -> bool:
    """Whether the run should save its state and end."""
    return _State.noted is not None or (_State.asked is not None and _State.asked())


@contextmanager
def asking(asked: Callable[[], bool]) -> Iterator[None]:
    """In the body, `wanted` also calls this function."""
    before, _State.asked = _State.asked, asked
    try:
        yield
    finally:
        _State.asked = before


@contextmanager
def deferred() -> Iterator[None]:
    """Record signals in the body instead of raising `KeyboardInterrupt`.

    This holds in the main thread, for signals that would raise `KeyboardInterrupt` or end the process by default.

    Raises:
        KeyboardInterrupt: at the end of the body, after a signal; or at a second signal, `AGAIN_S` after the first.
    """
    if _State.depth or threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    for number, usual in ((signal.SIGINT, ()), (signal.SIGTERM, (signal.SIG_DFL,))):
        handler = signal.getsignal(number)
        if handler is signal.default_int_handler or handler in usual:
            before[number] = signal.signal(number, _note)
    _State.depth, _State.noted = 1, None
    try:
        yield
        if _State.noted is not None:
            raise KeyboardInterrupt
    finally:
        _State.depth, _State.noted = 0, None
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def terminable(enabled: bool) -> Iterator[None]:
    """Handle SIGTERM, which schedulers send, as Ctrl-C in the body; in the main thread only."""
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.noted is None:
        _State.noted = now
    elif now - _State.noted >= AGAIN_S:
        raise KeyboardInterrupt
