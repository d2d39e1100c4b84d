"""Progress on stderr: bars on a terminal, each on one line; elsewhere a plain line every 10 seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import Progress

from irdscale.utils.bar_lines import Lines, count_of, fields_of, texts_of
from irdscale.utils.terminal import print_line

PLAIN_SECONDS = 10.0
# The steps of a search take minutes. With rich's default of 30 seconds, their rate would stay unknown.
RATE_SECONDS = 3600.0

console = Console(stderr=True)


class Advance(Protocol):
    def __call__(self, n: float = 1, note: str = "", earlier: bool = False, **shown: Any) -> None:
        """Add `n` finished items; `note` is shown after the bar until the next call.

        Args:
            earlier: whether an earlier run finished them; they do not count for the rate.
            shown: values of `irdscale.utils.bar_lines.FIELDS`, each shown until a call replaces it; None removes it.
        """


Listener = Callable[[str, float, float | None, str], None]


class _State:
    """The state that open bars share."""

    live: _Bars | None = None
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
        yield lambda n=1, note="", earlier=False, **shown: None
        return
    show = _live if console.is_terminal else _plain
    _State.depth += 1
    try:
        with show(description, total) as advance:
            yield advance
    finally:
        _State.depth -= 1


class _Bars(Progress):
    """Bars, one line each, with the renderable of `show_below` below them until they end."""

    over = False

    def get_renderables(self) -> Iterable[RenderableType]:
        yield Lines(self.tasks, self.over)
        if _State.below is not None and not self.over:
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

    def advance(n: float = 1, note: str = "", earlier: bool = False, **shown: Any) -> None:
        nonlocal done
        done += n
        listener(description, done, total, ", ".join(texts_of({**shown, "note": note})))

    return advance


@contextmanager
def _live(description: str, total: int | None) -> Iterator[Advance]:
    outermost = _State.live is None
    if _State.live is None:
        _State.below = None
        _State.live = _Bars(console=console, speed_estimate_period=RATE_SECONDS)
        _State.live.start()
    live = _State.live
    values: dict[str, Any] = {}
    task = live.add_task(description, total=total, shown=values)

    def advance(n: float = 1, note: str = "", earlier: bool = False, **shown: Any) -> None:
        if earlier:
            # `update` would count them for the rate.
            next(each for each in live.tasks if each.id == task).completed += n
        values.update(shown, note=note)
        live.update(task, advance=0 if earlier else n)

    try:
        yield advance
    finally:
        if outermost:
            # What is below the bars may be set again by another thread.
            live.over, _State.below = True, None
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
    printed = -1.0
    values: dict[str, Any] = {}

    def line(over: bool = False) -> None:
        nonlocal printed, own
        printed, own = done, time.monotonic()
        _State.printed = own
        say(_line(description, done, total, own - start, values, before, over))

    def advance(n: float = 1, note: str = "", earlier: bool = False, **shown: Any) -> None:
        nonlocal done, before
        done, before = done + n, before + n * earlier
        values.update(shown, note=note)
        # The lines of inner bars do not keep the outermost one from printing its own.
        if time.monotonic() - (own if outermost else _State.printed) >= PLAIN_SECONDS:
            line()

    yield advance
    # The total may be an upper bound.
    if _State.depth == 1 and (printed != done or done < (total or 0)):
        line(over=True)


def _line(
    description: str,
    done: float,
    total: int | None,
    seconds: float,
    shown: dict[str, Any],
    earlier: float,
    over: bool,
) -> str:
    pace = (done - earlier) / seconds if seconds > 0 else 0.0
    share = f" ({100 * done / total:.0f} %)" if total else ""
    fields = [text for field, text in fields_of(done, total, seconds, pace, shown, over) if field.name != "elapsed"]
    return f"{description}: {', '.join([count_of(done, total) + share, *fields])}"


def say(message: str) -> None:
    """Print one line on stderr, above the open bars; on a terminal, wrapped between words."""
    print_line(console, message)
