"""Check labels row by row, and turn them into numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from irdscale.errors import InputError
from irdscale.models.classes import are_placeholders, listed, places_of
from irdscale.utils.suggestions import nearest

_KEY = "task.columns.label"


def is_missing(label: Any) -> bool:
    """Whether a label is null, NaN or an empty string."""
    return label is None or label == "" or (isinstance(label, float) and math.isnan(label))


def is_unlabelled(labels: Sequence[Any]) -> bool:
    """Whether all labels are -1 or missing, as in the test splits of benchmarks."""
    return all(is_missing(label) or (not isinstance(label, str) and label == -1) for label in labels)


def _refuse_missing(labels: Sequence[Any], where: str) -> None:
    for row, label in enumerate(labels):
        if is_missing(label):
            raise InputError("found no label", "one in every row", _KEY, f"{where}, row {row}")


def regression_labels(labels: Sequence[Any], where: str) -> np.ndarray:
    """The labels as float32.

    Args:
        labels: a column; row 0 comes first.
        where: the file and column, for messages.

    Raises:
        InputError: a label is missing or not a finite number.
    """
    _refuse_missing(labels, where)
    for row, label in enumerate(labels):
        if isinstance(label, (str, bool)) or not isinstance(label, (int, float)) or math.isinf(label):
            raise InputError(f"found {label!r}", "a finite number, for regression", _KEY, f"{where}, row {row}")
    return np.asarray(labels, dtype=np.float32)


def class_labels(
    splits: Mapping[str, Sequence[Any]],
    where: Mapping[str, str],
    names: Sequence[str] | None,
    declared: Mapping[str, Sequence[str] | None] | None = None,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The labels of each split as class numbers (int64), and the names of the classes in that order.

    Args:
        splits: the label column of `train` and of the other labelled splits.
        where: each split's file and column, for messages.
        names: the classes, where the data set declares them. Otherwise the labels of train are the classes: names in
            alphabetical order, or the integers from 0.
        declared: the names of each split's class numbers, where it declares them; its labels are matched by name.

    Raises:
        InputError: a label is missing, not a class, or a class that no row of train has; or there is only one class.
    """
    for split, labels in splits.items():
        _refuse_missing(labels, where[split])
    train, declared = splits["train"], declared or {}
    numbered = names is not None
    if names is None and are_names(train):
        names = sorted(set(train))
    if names is None:
        numbers = {"train": _integers(train, None, where["train"])}
        count, numbered = _count_classes(numbers["train"], where["train"]), True
        names = [str(number) for number in range(count)]
    if len(names) < 2:
        raise InputError(f"found one class ({listed(names)})", "two or more", _KEY, where["train"])
    index = {name: number for number, name in enumerate(names)}
    numbers = {}
    for split, labels in splits.items():
        own = declared.get(split)
        # Where train has names without declared numbers, the numbers of another split mean nothing.
        if any(isinstance(label, str) for label in labels) or not (numbered or own):
            numbers[split] = _named(labels, index, where[split])
        elif own:
            numbers[split] = _declared(labels, own, names, where[split])
        else:
            numbers[split] = _integers(labels, len(names), where[split])
    for split in splits:
        _refuse_unknown(numbers["train"], numbers[split], names, where[split])
    return numbers, list(names)


def are_names(labels: Sequence[Any]) -> bool:
    """Whether labels are the names of classes, rather than numbers."""
    return all(isinstance(label, str) for label in labels)


def _declared(labels: Sequence[Any], own: Sequence[str], names: Sequence[str], where: str) -> np.ndarray:
    """Class numbers in `own` as class numbers in `names`: matched by name, or unchanged if one side has no names."""
    found = [places_of([name], names) for name in own]
    if None in found and (are_placeholders(own) or are_placeholders(names)):
        found = [[number] if number < len(names) else None for number in range(len(own))]
    places = np.asarray([-1 if place is None else place[0] for place in found])
    numbers = _integers(labels, len(own), where)
    unknown = np.flatnonzero(places[numbers] < 0)
    if unknown.size:
        name = own[numbers[unknown[0]]]
        fault, place = f"found class {name!r}{nearest(name, names)}", f"{where}, row {unknown[0]}"
        raise InputError(fault, f"one of the classes of train: {listed(names)}", _KEY, place)
    return places[numbers].astype(np.int64)


def _refuse_unknown(train: np.ndarray, numbers: np.ndarray, names: Sequence[str], where: str) -> None:
    unknown = np.flatnonzero(~np.isin(numbers, train))
    if unknown.size:
        fault = f"found class {names[numbers[unknown[0]]]!r}, which no row of train has"
        raise InputError(fault, "classes that train has", _KEY, f"{where}, row {unknown[0]}")


def _named(labels: Sequence[Any], index: Mapping[str, int], where: str) -> np.ndarray:
    for row, label in enumerate(labels):
        if label not in index:
            fault, expected = f"found label {label!r}{nearest(label, index)}", listed(list(index))
            raise InputError(fault, f"one of the classes of train: {expected}", _KEY, f"{where}, row {row}")
    return np.asarray([index[label] for label in labels], dtype=np.int64)


def _integers(labels: Sequence[Any], count: int | None, where: str) -> np.ndarray:
    expected = "a class number, 0 or more" if count is None else f"a class number from 0 to {count - 1}"
    for row, label in enumerate(labels):
        if not isinstance(label, (int, float)) or label % 1 != 0:
            names = f"{expected} or, in all rows, a name"
            raise InputError(f"found label {label!r}", names, _KEY, f"{where}, row {row}")
        if label < 0 or (count is not None and label >= count):
            raise InputError(f"label out of range: found {label!r}", expected, _KEY, f"{where}, row {row}")
    return np.asarray(labels, dtype=np.int64)


def _count_classes(numbers: np.ndarray, where: str) -> int:
    found = np.unique(numbers)
    if found[-1] != len(found) - 1:
        absent = next(number for number in range(int(found[-1])) if number not in found)
        fault = f"found classes {listed(found.tolist())}, but no row of class {absent}"
        raise InputError(fault, "every class from 0 up (or names)", _KEY, where)
    return len(found)
