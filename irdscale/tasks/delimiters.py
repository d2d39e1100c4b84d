"""Delimiters of CSV files: the one that a file has, and a clear error where another is expected."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from irdscale.errors import InputError

CSV_TYPES = (".csv", ".tsv")
KNOWN = (",", ";", "\t", "|")
# Bytes and rows of a file that are looked at.
_BYTES, _ROWS = 1 << 16, 20


def delimiter_of(path: Path, given: str | None) -> str:
    """The delimiter to read a file with: `task.delimiter`, or that of the file's type."""
    return given or ("\t" if path.suffix == ".tsv" else ",")


def shown(delimiter: str) -> str:
    """A delimiter as `task.delimiter` may give it."""
    return "tab" if delimiter == "\t" else repr(delimiter)


def found_delimiter(path: Path) -> str | None:
    """The delimiter that parts the file's first rows into equally many columns; None if it has one column."""
    rows = {each: _first_rows(path, each) for each in KNOWN}
    several = [each for each in KNOWN if rows[each] and len(rows[each][0]) > 1]
    even = [each for each in several if all(len(row) == len(rows[each][0]) for row in rows[each] if row)]
    return max(even or several, key=lambda each: len(rows[each][0]), default=None)


def _first_rows(path: Path, delimiter: str) -> list[list[str]]:
    with path.open("rb") as stream:
        text = stream.read(_BYTES)
    whole = len(text) < _BYTES
    try:
        rows = list(csv.reader(io.StringIO(text.decode("utf-8-sig", "replace"), newline=""), delimiter=delimiter))
    except csv.Error:
        return []
    # The last row may be cut.
    return (rows if whole else rows[:-1])[:_ROWS]


def refuse_other_delimiter(path: Path, used: str, found: Sequence[str], needed: Sequence[str]) -> None:
    """Raise InputError if columns are missing because the file has another delimiter.

    Args:
        used: delimiter that the file was read with.
        found: columns that were read; empty if the file could not be read.
        needed: columns that the task names.
    """
    if found and set(needed) <= set(found):
        return
    other = found_delimiter(path)
    if other is None or other == used or len(found) > 1:
        return
    raise InputError(
        f"found columns that {shown(other)} parts, not {shown(used)}",
        f"task.delimiter={shown(other)}",
        "task.delimiter",
        path,
    )
