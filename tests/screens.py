"""A terminal for tests: a pseudo-terminal, and what its screen shows."""

from __future__ import annotations

import os
import pty
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from irdscale.utils import progress

_PIECES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(.)", re.DOTALL)


class Screen:
    """The lines of a terminal after some output, without a lower edge.

    Attributes:
        lines: the lines, without spaces at their ends.
        frames: the lines before each time that some are erased, which is when live lines are drawn anew.
        wrapped: whether any line was longer than the terminal is wide.
    """

    def __init__(self, width: int) -> None:
        self._width, self._row, self._column = width, 0, 0
        self._cells: list[list[str]] = [[]]
        self.frames: list[list[str]] = []
        self.wrapped = self._drawn = False

    @property
    def lines(self) -> list[str]:
        return ["".join(cells).rstrip() for cells in self._cells]

    def write(self, text: str) -> None:
        for numbers, command, letter in _PIECES.findall(text):
            if command in ("A", "K") and self._drawn:
                self.frames.append(self.lines)
                self._drawn = False
            if command == "A":
                self._row = max(0, self._row - int(numbers or 1))
            elif command == "K":
                self._cells[self._row] = []
            elif command == "m" or numbers.startswith("?"):
                pass
            elif command:
                raise NotImplementedError(command)
            elif letter == "\r":
                self._column = 0
            elif letter == "\n":
                self._to(self._row + 1)
            else:
                self._put(letter)

    def _to(self, row: int) -> None:
        self._row = row
        while len(self._cells) <= row:
            self._cells.append([])

    def _put(self, letter: str) -> None:
        if self._column >= self._width:
            self.wrapped = True
            self._to(self._row + 1)
            self._column = 0
        cells = self._cells[self._row]
        cells += " " * (self._column + 1 - len(cells))
        cells[self._column] = letter
        self._drawn = True
        self._column += 1


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> Iterator[Screen]:
    """Make stdout and stderr of this process a terminal for the body; yields its screen, which is complete after it."""
    for name, value in {"COLUMNS": str(width), "LINES": "60", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    screen, (ours, theirs) = Screen(width), pty.openpty()
    read: list[bytes] = []

    def reading() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other side is closed
                return
            if not data:
                return
            read.append(data)

    reader = threading.Thread(target=reading)
    reader.start()
    with monkeypatch.context() as patch, open(theirs, "w", encoding="utf-8", buffering=1) as stream:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        # A console finds out once whether it is on a terminal.
        patch.setattr(progress, "console", Console(stderr=True))
        try:
            yield screen
        finally:
            stream.flush()
    reader.join()
    os.close(ours)
    screen.write(b"".join(read).decode())
