"""Rows that make no samples, found without an end at the first one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import datasets
import numpy as np

from irdscale.errors import InputError
from irdscale.tasks.splits import Part

# Rows of a split that are looked for: each takes some ten readings of the split.
MOST = 20


@dataclass
class Refused:
    """Rows that were refused: the split of each, its row, and why. `is_part` says that there may be more."""

    rows: list[tuple[str, int, str]] = field(default_factory=list)
    is_part: bool = False


def accepted(
    name: str, part: Part, make: Callable[[Part], datasets.Dataset], refused: Refused | None
) -> datasets.Dataset:
    """The samples that `make` makes of a part; with `refused`, those of its rows that are not refused.

    A part with refused rows is halved until they stand alone.

    Args:
        name: of the split, for `refused`.
        refused: gets the refused rows.

    Raises:
        InputError: as `make`; with `refused`, if no row is accepted, or all are refused for the same reason.
    """
    try:
        return make(part)
    except InputError as error:
        if refused is None or not _is_about_rows(part, make):
            raise
        first = error
    found: list[datasets.Dataset] = []
    waiting = [part.rows]
    left = MOST
    while waiting:
        rows = waiting.pop()
        try:
            found.append(make(Part(part.split, rows, part.origin)))
        except InputError as error:
            if not left:
                # Some of these rows may be good, but they are not looked for.
                refused.is_part = True
            elif len(rows) == 1:
                refused.rows.append((name, int(rows[0]), str(error)))
                left -= 1
            else:
                waiting += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
    if not found:
        raise first
    return datasets.concatenate_datasets(found)


def _is_about_rows(part: Part, make: Callable[[Part], datasets.Dataset]) -> bool:
    """Whether what is wrong is not the same for the first and the last row, as a missing column is."""
    said = set()
    for rows in (part.rows[:1], part.rows[-1:]):
        try:
            make(Part(part.split, np.asarray(rows), part.origin))
        except InputError as error:
            said.add(str(error))
        else:
            return True
    return len(said) > 1
