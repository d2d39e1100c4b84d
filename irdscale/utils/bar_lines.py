"""The line of a progress bar: a description, a drawn bar, a count and fields, never longer than the terminal is wide.

Where a line is too long, the drawn bar shrinks first. Then whole fields are left out, in the order of `Field.kept`. The
description is cut last. A number is never cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from irdscale.utils.formats import duration, speed

# Cells of the drawn bar.
LONGEST, SHORTEST = 30, 8
GAP = "  "


@dataclass(frozen=True)
class Field:
    """A field of a bar.

    Attributes:
        name: keyword of `Advance` that sets it.
        form: its text, with `{}` for the value.
        kept: rank; where the line is too long, the field with the lowest rank is left out first.
    """

    name: str
    form: str
    kept: int


# In the order in which they are shown. The drawn bar is left out like a field.
FIELDS = (
    Field("rate", "{}", 2),
    Field("elapsed", "{}", 1),
    Field("time", "{}", 6),
    Field("loss", "loss {:.4f}", 5),
    Field("method", "{}", 8),
    # The best metric so far, of the method beside it.
    Field("best", "best {:.4f}", 7),
    Field("note", "{}", 3),
)
DRAWN_BAR = Field("bar", "", 4)


class Lines:
    """The lines of open bars, whose counts stand below each other."""

    def __init__(self, tasks: list[Task], over: bool = False) -> None:
        self._tasks, self._over = [task for task in tasks if task.visible], over

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if not self._tasks:
            return
        width = options.max_width
        counts = [count_of(task.completed, task.total) for task in self._tasks]
        longest = max(cell_len(task.description) for task in self._tasks)
        # The numbers are kept, so the description is what may be cut.
        described = max(1, min(longest, width - 1 - max(map(len, counts))))
        counted = max(map(len, counts))
        fields = [fitting(_fields(task, self._over), width - described - 1 - counted) for task in self._tasks]
        drawn = min(bar for bar, _ in fields)
        for task, count, (_, texts) in zip(self._tasks, counts, fields, strict=True):
            line = Table.grid(padding=(0, 1))
            line.add_column(width=described, no_wrap=True, overflow="ellipsis")
            cells: list[RenderableType] = [Text(task.description)]
            if drawn:
                line.add_column(width=drawn)
                total = None if task.total is None else max(task.total, 1e-9)
                cells.append(ProgressBar(total, task.completed, width=drawn, animation_time=task.get_time()))
            line.add_column(no_wrap=True, overflow="crop")
            cells.append(Text(GAP.join((count.rjust(counted), *texts)), style="progress.download"))
            line.add_row(*cells)
            yield line


def fitting(fields: list[tuple[Field, str]], room: int) -> tuple[int, list[str]]:
    """The width of the drawn bar, 0 if it is left out, and the fields that fit beside it in `room` cells."""
    kept = [(DRAWN_BAR, ""), *((field, text) for field, text in fields if text)]
    while kept:
        texts = [text for field, text in kept if field is not DRAWN_BAR]
        left = room - sum(len(GAP) + cell_len(text) for text in texts)
        drawn = any(field is DRAWN_BAR for field, _ in kept)
        if left >= (1 + SHORTEST if drawn else 0):
            return min(LONGEST, left - 1) if drawn else 0, texts
        kept.remove(min(kept, key=lambda one: one[0].kept))
    return 0, []


def _fields(task: Task, over: bool) -> list[tuple[Field, str]]:
    elapsed, pace = task.elapsed or 0.0, task.finished_speed or task.speed or 0.0
    return fields_of(task.completed, task.total, elapsed, pace, task.fields["shown"], over)


def count_of(done: float, total: float | None) -> str:
    """`32/256`, or `32` if the total is unknown."""
    return f"{done:,.0f}" if total is None else f"{done:,.0f}/{total:,.0f}"


def fields_of(
    done: float, total: float | None, seconds: float, pace: float, shown: dict[str, Any], over: bool = False
) -> list[tuple[Field, str]]:
    """The fields of a bar and their texts, empty where there is nothing to show.

    Args:
        pace: items per second; 0 if unknown.
        shown: values of fields by name.
        over: whether the work ended, maybe with fewer items than `total`, so that there is no time left.
    """
    open_ = not over and total is not None and done < total
    left = f"{duration((total - done) / pace)} left" if open_ and total is not None and pace > 0 else ""
    texts = {"rate": speed(pace), "elapsed": duration(seconds) if left else "", "time": left or duration(seconds)}
    values = {name: value for name, value in (texts | shown).items() if value not in (None, "")}
    return [(field, field.form.format(values[field.name])) for field in FIELDS if field.name in values]


def texts_of(shown: dict[str, Any]) -> list[str]:
    """The texts of the fields that a caller has set, in order."""
    return [field.form.format(shown[field.name]) for field in FIELDS if shown.get(field.name) not in (None, "")]
