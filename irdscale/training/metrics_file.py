"""The metrics of a training in a JSONL file: one line per optimizer step, none twice, also across a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from irdscale.utils.files import write_atomic, writing

NAME = "metrics.jsonl"


class MetricsFile:
    """Appends the lines of one training; for rank 0.

    Raises:
        RunError: the file cannot be written.
    """

    def __init__(self, path: Path, done: int) -> None:
        """Cut the file back to the lines of the first `done` steps; a line torn by a crash goes too."""
        self.path = path
        with writing(path):
            before = path.read_bytes() if path.exists() else b""
        kept = _lines_up_to(before, done)
        if kept != before:
            write_atomic(path, kept)

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Append one line each; they reach the disk with `sync`."""
        text = "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as stream:
                stream.write(text)

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        if self.path.exists():
            with writing(self.path), self.path.open("rb") as stream:
                os.fsync(stream.fileno())


def _lines_up_to(data: bytes, done: int) -> bytes:
    """The whole lines of ascending steps up to `done`."""
    kept, last = [], 0
    for line in data.split(b"\n")[:-1]:
        try:
            found = json.loads(line)
            step = found["step"]
        except (ValueError, TypeError, KeyError):
            continue
        if isinstance(step, int) and last < step <= done:
            kept.append(line + b"\n")
            last = step
    return b"".join(kept)
