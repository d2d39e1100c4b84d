"""Labels: which values are taken, and what is said of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from irdscale.tasks.labels import class_labels, is_unlabelled, regression_labels
from tests.tasks.errors import refused


def classes(
    train: list[Any], validation: list[Any] | None = None, names: list[str] | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    splits = {"train": train} | ({"validation": validation} if validation is not None else {})
    return class_labels(splits, {name: f"{name}.csv" for name in splits}, names)


def test_integers_from_zero() -> None:
    numbers, names = classes([0, 2, 1, 0], [2, 2])
    assert names == ["0", "1", "2"]
    assert numbers["train"].tolist() == [0, 2, 1, 0]
    assert numbers["validation"].tolist() == [2, 2]
    assert numbers["train"].dtype == np.int64


def test_booleans_and_whole_floats_are_class_numbers() -> None:
    assert classes([True, False])[0]["train"].tolist() == [1, 0]
    assert classes([1.0, 0.0])[0]["train"].tolist() == [1, 0]


def test_names_are_numbered_in_alphabetical_order() -> None:
    numbers, names = classes(["pos", "neg", "pos"], ["neg"])
    assert names == ["neg", "pos"]
    assert numbers["train"].tolist() == [1, 0, 1]
    assert numbers["validation"].tolist() == [0]


def test_declared_names_keep_their_order_and_take_numbers_too() -> None:
    numbers, names = classes(["yes", "no"], [0, 1], names=["yes", "no"])
    assert names == ["yes", "no"]
    assert numbers["train"].tolist() == [0, 1]
    assert numbers["validation"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("train", "validation", "names", "message"),
    [
        ([0, 1, None], None, None, "train.csv, row 2: found no label"),
        ([0, 1, float("nan")], None, None, "train.csv, row 2: found no label"),
        (["a", ""], None, None, "train.csv, row 1: found no label"),
        ([0, 1], [1, None], None, "validation.csv, row 1: found no label"),
        ([0, 1.5], None, None, "train.csv, row 1: found label 1.5; expected a class number"),
        ([0, float("inf")], None, None, "train.csv, row 1: found label inf"),
        ([0, 1, "x"], None, None, "train.csv, row 2: found label 'x'"),
        ([0, {"a": 1}], None, None, "train.csv, row 1: found label {'a': 1}"),
        ([1, 0, -1], None, None, "train.csv, row 2: label out of range: found -1; expected a class number, 0 or more"),
        ([0, 1], [0, 2], None, "validation.csv, row 1: label out of range: found 2; expected .* from 0 to 1"),
        ([0, 3], None, ["a", "b", "c"], "train.csv, row 1: label out of range: found 3; expected .* from 0 to 2"),
        ([1, 2], None, None, "train.csv: found classes 1, 2, but no row of class 0"),
        ([0, 5000], None, None, "train.csv: found classes 0, 5000, but no row of class 1"),
        ([0, 0], None, None, r"train.csv: found one class \(0\); expected two or more"),
        (["a", "b"], ["a", "bb"], None, r"validation.csv, row 1: found label 'bb' .*classes of train: a, b"),
    ],
)
def test_bad_classes_are_named_with_their_row(
    train: list[Any], validation: list[Any] | None, names: list[str] | None, message: str
) -> None:
    with refused(message):
        classes(train, validation, names)


@pytest.mark.parametrize(
    ("train", "own", "other", "expected"),
    [
        ([0, 1, 2], ["a", "b", "c"], ["c", "a", "b"], [2, 0, 1]),
        ([0, 1, 2], ["a", "b", "c"], ["b", "A", "unused", "C"], [1, 0, 2]),
        ([0, 1, 2], ["a", "b", "c"], None, [0, 1, 2]),
        ([0, 1, 2], ["a", "b", "c"], ["0", "1", "2"], [0, 1, 2]),
        ([0, 1, 2], ["0", "1", "2"], ["2", "1", "0"], [2, 1, 0]),
        (["a", "b", "c"], None, ["c", "a", "b"], [2, 0, 1]),
        ([0, 1, 2], None, ["c", "a", "b"], [0, 1, 2]),
    ],
)
def test_numbers_of_another_split_are_taken_by_its_own_names(
    train: list[Any], own: list[str] | None, other: list[str] | None, expected: list[int]
) -> None:
    numbers = [0, 1, 3] if other and "unused" in other else [0, 1, 2]
    where = {"train": "train", "test": "test"}
    found = class_labels({"train": train, "test": numbers}, where, own, {"train": own, "test": other})[0]
    assert found["test"].tolist() == expected


@pytest.mark.parametrize(
    ("train", "own", "other", "message"),
    [
        ([0, 1], ["neg", "pos"], ["negative", "positive"], "row 0: found class 'negative'.*of train: neg, pos"),
        ([0, 1], ["neg", "pos"], ["mid", "neg", "pos"], "row 0: found class 'mid'; expected one of .* neg, pos"),
        ([0, 0], ["neg", "pos"], ["pos", "neg"], "row 0: found class 'pos', which no row of train has"),
        (["a", "b"], None, None, "row 0: found label 0; expected one of the classes of train: a, b"),
        ([0, 1], ["neg", "pos"], ["a"], "row 1: label out of range: found 1; expected a class number from 0 to 0"),
    ],
)
def test_classes_that_train_does_not_have_are_named(
    train: list[Any], own: list[str] | None, other: list[str] | None, message: str
) -> None:
    with refused(f"^test, {message}"):
        class_labels(
            {"train": train, "test": [0, 1]}, {"train": "train", "test": "test"}, own, {"train": own, "test": other}
        )


def test_regression_takes_finite_numbers() -> None:
    assert regression_labels([1, 2.5], "x").tolist() == [1.0, 2.5]
    assert regression_labels([1], "x").dtype == np.float32


@pytest.mark.parametrize("bad", ["3", True, float("inf"), None, float("nan")])
def test_bad_regression_labels_are_named_with_their_row(bad: Any) -> None:
    with refused("x, row 1: found"):
        regression_labels([0.5, bad], "x")


def test_unlabelled_means_every_row() -> None:
    assert is_unlabelled([-1, -1])
    assert is_unlabelled([None, ""])
    assert not is_unlabelled([-1, 0])
    assert not is_unlabelled(["-1"])
