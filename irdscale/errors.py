"""The two ways a verb ends badly: the user's input is wrong (exit code 2), or the run failed (exit code 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def kind_of(value: object) -> str:
    """What an error says was found where a value is of the wrong type."""
    return "nothing" if value is None else type(value).__name__


class InputError(ValueError):
    """Bad input, told in one line: `WHERE: KEY: FOUND; expected EXPECTED`.

    Attributes:
        found: fault as the line says it ("found 3", "no such folder")
        expected: input that would do; empty where the fault says it
        key: configuration key, argument or name that the fault is about; may be empty
        where: file, row, method or host of the fault; empty where the key is enough
    """

    def __init__(self, found: str, expected: str = "", key: str = "", where: Path | str = "") -> None:
        self.found, self.expected, self.key, self.where = found, expected, key, str(where)
        super().__init__(found, expected, key, self.where)

    def __str__(self) -> str:
        line = ": ".join(part for part in (self.where, self.key, self.found) if part)
        return f"{line}; expected {self.expected}" if self.expected else line


class RunError(RuntimeError):
    """A run that had good input but could not finish, such as NaN in the loss or a full disk."""


class TrainingError(RunError):
    """Training diverged (NaN or Inf). Other candidates may still succeed."""
