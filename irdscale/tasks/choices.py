"""Multiple choice: the choices of each row, and which of them is right."""

from __future__ import annotations

import string
from typing import Any

from irdscale.config.task import ColumnsConfig
from irdscale.errors import InputError, kind_of
from irdscale.tasks.class_names import declared_names
from irdscale.tasks.data import Rows
from irdscale.tasks.labels import is_missing
from irdscale.utils.suggestions import nearest

# The fields of a column of choices that hold their texts and their labels, as in ARC.
TEXT, LABEL = "text", "label"


def choice_texts(rows: Rows, names: list[str]) -> list[list[str]]:
    """The choices of each row, from a column of lists, or one column for each choice.

    Raises:
        InputError: a column is missing or of the wrong type.
    """
    if len(names) > 1:
        return [list(row) for row in zip(*(rows.texts(name, "choices") for name in names), strict=True)]
    found = rows.column(names[0], "choices").to_pylist()
    for row, value in enumerate(found):
        texts = _field(value, TEXT) if _has_fields(value) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            place = f"{rows.where}: column {names[0]!r}, row {row}"
            expected = "a list of texts (or name several columns)"
            raise InputError(f"found {kind_of(value)}", expected, "task.columns.choices", place)
        found[row] = texts
    return found


def _has_fields(value: Any) -> bool:
    """Whether choices are {"text": [..], "label": [..]}, or a list of {"text": .., "label": ..}."""
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _field(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return value.get(name)
    return [each.get(name) if isinstance(each, dict) else None for each in value or []]


def _plain(label: Any) -> str:
    """The label of a choice as text, whatever its type."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip()


class RightChoices:
    """Which choice is right in each row.

    The labels of the choices decide what `label` means. They stand in the choices' own column (`choices.label`) or in
    those of `task.columns.choice_labels`; else the names of the choices' columns count; else 0, 1, 2, or A, B, C.
    """

    def __init__(self, rows: Rows, columns: ColumnsConfig, choices: list[list[str]]) -> None:
        """Read the labels of all rows, since one row can show how all are counted.

        Raises:
            InputError: a column is missing or of the wrong type, or labels count from 1 without `choice_labels`.
        """
        assert columns.label is not None
        assert columns.choices is not None
        self._rows, self._choices, self._columns = rows, choices, columns
        labels = rows.column(columns.label, "label").to_pylist()
        self._called = _called(rows, columns)
        declared = declared_names(rows.table, columns.label)
        if declared is not None and self._by_name(declared):
            labels = [
                declared[label] if isinstance(label, int) and 0 <= label < len(declared) else label for label in labels
            ]
        self._labels = labels
        self._letters = any(isinstance(label, str) and _letter(label) is not None for label in labels)
        if self._called is None:
            self._refuse_beyond()

    def _by_name(self, declared: list[str]) -> bool:
        """Whether the names of class numbers, rather than the numbers, tell which choice is meant."""
        if self._called is not None:
            return any(_plain(name) in declared for called in self._called for name in called or ())
        if set(declared) <= set(self._columns.choices or ()):
            return True
        if all(_letter(name) is not None for name in declared):
            return True
        return sorted(declared) == sorted(map(str, range(len(declared))))

    def _refuse_beyond(self) -> None:
        for row, label in enumerate(self._labels):
            number = _counted(label)
            if number is not None and number >= len(self._choices[row]) >= 2:
                raise self._error(row)

    def _error(self, row: int) -> InputError:
        label, last = self._labels[row], len(self._choices[row]) - 1
        counting = f"the right choice's number, 0 to {last}"
        if _counted(label) == last + 1:
            counting += ", or task.columns.choice_labels with the labels of the choices"
        return InputError(f"found {label!r}", counting, "task.columns.label", f"{self._rows.where}, row {row}")

    def number(self, row: int) -> int:
        """The number of the right choice, from 0.

        Raises:
            InputError: the row has no label, or its label matches no choice, or several.
        """
        label, count = self._labels[row], len(self._choices[row])
        if is_missing(label) or isinstance(label, bool):
            raise self._error(row)
        if self._called is not None:
            return self._named(row, label)
        names = self._columns.choices or []
        if isinstance(label, str) and len(names) > 1 and label in names:
            return names.index(label)
        number = _letter(label) if self._letters else _counted(label)
        if number is None or not 0 <= number < count:
            raise self._error(row)
        return number

    def _named(self, row: int, label: Any) -> int:
        assert self._called is not None
        where = f"{self._rows.where}, row {row}"
        called, count = self._called[row], len(self._choices[row])
        if not isinstance(called, list) or len(called) != count or any(is_missing(name) for name in called):
            raise InputError(f"found {called!r}", f"labels of {count} choices", "task.columns.choice_labels", where)
        names, asked = [_plain(name) for name in called], _plain(label)
        if asked not in names:
            names, asked = [name.casefold() for name in names], asked.casefold()
        if names.count(asked) == 1:
            return names.index(asked)
        # Beside letters, an integer is a choice's number, as elsewhere; a text of digits is not.
        if isinstance(label, int) and 0 <= label < count and all(name.isalpha() for name in names):
            return label
        near = nearest(asked, names) if asked not in names else ""
        expected = f"one of the choices' own labels, each once: {', '.join(map(str, called))}"
        raise InputError(f"found {label!r}{near}", expected, "task.columns.label", where)


def _called(rows: Rows, columns: ColumnsConfig) -> list[Any] | None:
    """The labels of the choices of each row, or None where the data has none."""
    names, choices = columns.choice_labels, columns.choices or []
    if isinstance(names, list) and len(names) > 1:
        return [list(row) for row in zip(*(_values(rows, name) for name in names), strict=True)]
    if names is not None:
        return _values(rows, names if isinstance(names, str) else names[0])
    if len(choices) != 1:
        return None
    found = rows.column(choices[0], "choices").to_pylist()
    called = [_field(value, LABEL) if _has_fields(value) else None for value in found]
    none = all(name is None or (isinstance(name, list) and all(map(is_missing, name))) for name in called)
    return None if none else called


def _values(rows: Rows, name: str) -> list[Any]:
    """The values of a column, or of a field in a column of choices: `choices.label`."""
    column, _, field = name.rpartition(".")
    if name in rows.table.column_names or column not in rows.table.column_names:
        return rows.column(name, "choice_labels").to_pylist()
    values = rows.column(column, "choice_labels").to_pylist()
    return [_field(value, field) if _has_fields(value) else None for value in values]


def _counted(label: Any) -> int | None:
    """The number in a label that is an integer, or None."""
    if isinstance(label, bool) or is_missing(label):
        return None
    if isinstance(label, float):
        return int(label) if label.is_integer() else None
    if isinstance(label, str):
        label = label.strip()
        return int(label) if label.isascii() and label.isdigit() else None
    return label if isinstance(label, int) else None


def _letter(label: Any) -> int | None:
    """The position of a letter in the alphabet, or None for other labels."""
    text = label.strip().upper() if isinstance(label, str) else ""
    return string.ascii_uppercase.index(text) if len(text) == 1 and text in string.ascii_uppercase else None
