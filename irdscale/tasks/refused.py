"""Find all rows that make no samples, not only the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import datasets
import numpy as np

from irdscale.errors import InputError
from irdscale.tasks.splits import Part

# Most refused rows searched for in a split; each takes about ten passes over the split.
MOST = 20


@dataclass
class Refused:
    """Refused rows, each with split, row and reason. `is_part` says whether there may be more."""

    rows: list[tuple[str, int, str]] = field(default_factory=list)
    is_part: bool = False


def accepted(
    name: str, part: Part, make: Callable[[Part], datasets.Dataset], refused: Refused | None
) -> datasets.Dataset:
    """The samples of a part; with `refused`, of its accepted rows only.

    A part with refused rows is halved until each of them is found.

    Args:
        name: name of the split, for `refused`.
        make: makes the samples of a part.
        refused: receives the refused rows.

    Raises:
        InputError: as `make`; with `refused`, only if no row is accepted, or the error is not about single rows.
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
                # Some of these rows may be acceptable; the search for them stops here.
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
    """Whether the error is about single rows: a missing column gives the first and the last row the same error."""
    said = set()
    for rows in (part.rows[:1], part.rows[-1:]):
        try:
            make(Part(part.split, np.asarray(rows), part.origin))
        except InputError as error:
            said.add(str(error))
        else:
            return True
    return len(said) > 1
