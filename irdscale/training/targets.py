"""Checks of what a verb is asked to read and to write, before models and data are loaded. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

from irdscale.errors import InputError
from irdscale.utils.suggestions import nearest

EXPORT_FORMATS = ("merged", "shira")
HUB = "hub:"
# A file of predictions has one of these keys.
PREDICTED = ("class", "value", "choice", "completion")


def check_predict(input: str | None, text: str | None, to: str | None) -> None:
    """Check what to predict, and the file for it.

    Raises:
        InputError: both a file and a text are given, the file is missing or would be overwritten, or as `check_target`.
    """
    if input is not None and text is not None:
        raise InputError("found text= beside input=", "one of them", "text")
    if input is not None:
        check_input(input)
        if to is not None and Path(input).resolve() == Path(to).resolve():
            raise InputError(f"found {to}, which is input=", "another file", "to")
    check_target(to)


def check_input(file: str) -> None:
    """Check that the file of samples exists.

    Raises:
        InputError: it does not, or is a folder.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError("found a folder" if path.is_dir() else "no such file", "a file", "input", file)


def check_target(to: str | None) -> None:
    """Check that the file for predictions is new, empty, or holds predictions.

    Raises:
        InputError: it is a folder, or holds no predictions.
    """
    if to is None or not Path(to).exists():
        return
    expected = "a new file, or one of predictions"
    if not Path(to).is_file():
        raise InputError(f"{to} is a folder", expected, "to")
    try:
        with Path(to).open("rb") as stream:
            line = stream.readline()
        first = json.loads(line) if line else {"row": 0, PREDICTED[0]: ""}
    except (OSError, ValueError):
        first = None
    if not isinstance(first, dict) or "row" not in first or not any(key in first for key in PREDICTED):
        raise InputError(f"{to} exists, and holds no predictions", expected, "to")


def check_export(to: str, format: str | None) -> None:
    """Check the place and the format of an exported adapter.

    Raises:
        InputError: the format is unknown, or given with a place on the hub; or the folder exists and is not empty.
    """
    if format is not None and format not in EXPORT_FORMATS:
        raise InputError(f"found {format!r}{nearest(format, EXPORT_FORMATS)}", " or ".join(EXPORT_FORMATS), "format")
    if to.startswith(HUB):
        if format is not None:
            raise InputError(f"found {format!r} with to={to}", "none: the adapter is uploaded unchanged", key="format")
        return
    target = Path(to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{to} exists", "a new or empty folder", key="to")
