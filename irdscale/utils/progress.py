"""Progress on stderr: bars on a terminal, a plain line every 10 seconds in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_SECONDS = 10.0
# The steps of a search take minutes. With rich's default of 30 seconds, their rate would stay unknown.
RATE_SECONDS = 3600.0

console = Console(stderr=True)


class Advance(Protocol):
    def __call__(self, n: float = 1, note: str = "", earlier: bool = False) -> None:
        """Add `n` finished items; `note` is shown after the bar until the next call.

        Args:
            earlier: whether an earlier run finished them; they do not count for the rate.
        """


Listener = Callable[[str, float, float | None, str], None]


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.finished_speed or task.speed or 0.0), style="progress.data.speed")


class _State:
    """The state that open bars share."""

    live: Progress | None = None
    below: RenderableType | None = None
    listener: Listener | None = None
    depth: int = 0
    printed: float = float("-inf")


@contextmanager
def bar(description: str, total: int | None, enabled: bool = True) -> Iterator[Advance]:
    """Show progress on stderr while the body runs, if `enabled`.

    Bars may be nested; an inner one disappears when it ends. If stderr is not a terminal, a plain line is printed at
    most every 10 seconds, and one when the outermost bar ends.

    Args:
        description: name of the work, in a few words.
        total: number of items, or None if unknown.

    Yields:
        `advance(n=1, note="")`, to call when items are finished.
    """
    if _State.listener is not None:
        yield _listened(_State.listener, description, total)
        return
    if not enabled:
        yield lambda n=1, note="", earlier=False: None
        return
    show = _live if console.is_terminal else _plain
    _State.depth += 1
    try:
        with show(description, total) as advance:
            yield advance
    finally:
        _State.depth -= 1


class _Bars(Progress):
    """Bars, with the renderable of `show_below` below them."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if _State.below is not None:
            yield _State.below


def is_live() -> bool:
    """Whether bars are shown on a terminal now."""
    return _State.live is not None


def show_below(what: RenderableType | None) -> None:
    """Show `what` below the open bars, until the next call."""
    _State.below = what


@contextmanager
def progress_listener(listener: Listener) -> Iterator[None]:
    """In the body, call `listener` with description, finished items, total and note, instead of showing bars."""
    _State.listener = listener
    try:
        yield
    finally:
        _State.listener = None


def _listened(listener: Listener, description: str, total: int | None) -> Advance:
    done = 0.0

    def advance(n: float = 1, note: str = "", earlier: bool = False) -> None:
        nonlocal done
        done += n
        listener(description, done, total, note)

    return advance


@contextmanager
def _live(description: str, total: int | None) -> Iterator[Advance]:
    outermost = _State.live is None
    if _State.live is None:
        _State.live = _Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.fields[of]}"),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False, style="dim"),
            console=console,
            speed_estimate_period=RATE_SECONDS,
        )
        _State.live.start()
    live = _State.live
    task = live.add_task(description, total=total, of="?" if total is None else total, note="")

    def advance(n: float = 1, note: str = "", earlier: bool = False) -> None:
        if earlier:
            # `update` would count them for the rate.
            next(each for each in live.tasks if each.id == task).completed += n
        live.update(task, advance=0 if earlier else n, note=note)

    try:
        yield advance
    finally:
        if outermost:
            live.stop()
            _State.live = None
        else:
            live.remove_task(task)


@contextmanager
def _plain(description: str, total: int | None) -> Iterator[Advance]:
    start = own = time.monotonic()
    outermost = _State.depth == 1
    if outermost:
        _State.printed = start
    done = before = 0.0
    shown = -1.0
    last_note = ""

    def line() -> None:
        nonlocal shown, own
        shown, _State.printed = done, time.monotonic()
        own = _State.printed
        console.print(
            _line(description, done, total, _State.printed - start, last_note, before),
            soft_wrap=True,
            markup=False,
            highlight=False,
        )

    def advance(n: float = 1, note: str = "", earlier: bool = False) -> None:
        nonlocal done, before, last_note
        done, before, last_note = done + n, before + n * earlier, note
        # The lines of inner bars do not keep the outermost one from printing its own.
        if time.monotonic() - (own if outermost else _State.printed) >= PLAIN_SECONDS:
            line()

    yield advance
    if _State.depth == 1 and shown != done:
        line()


def _line(description: str, done: float, total: int | None, seconds: float, note: str, earlier: float = 0.0) -> str:
    parts = [f"{done:g}/{total} ({100 * done / total:.0f} %)" if total else f"{done:g}"]
    speed = (done - earlier) / seconds if seconds > 0 else 0.0
    parts += [_rate(speed)] if speed else []
    if total and speed and done < total:
        parts.append(f"{duration((total - done) / speed)} left")
    else:
        parts.append(duration(seconds))
    parts += [note] if note else []
    return f"{description}: {', '.join(parts)}"


def _rate(speed: float) -> str:
    """Items per second, or seconds per item if that number is larger."""
    if speed <= 0:
        return ""
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


def duration(seconds: float) -> str:
    """`0:07`, `12:34` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(message: str) -> None:
    """Print one line on stderr, above the open bars."""
    console.print(message, soft_wrap=True, markup=False, highlight=False)
