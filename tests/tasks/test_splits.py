"""Train, selection and test: disjoint, stratified, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irdscale.tasks.splits import Part, assign, carve, draw, halve

LABELS = np.random.default_rng(0).choice(3, size=200, p=[0.6, 0.3, 0.1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=80), st.integers(0, 5))
def test_halves_share_out_every_class_to_within_one_row(values: list[int], seed: int) -> None:
    labels = np.array(values)
    first, second = halve(len(labels), labels, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    for label in set(values):
        assert abs((labels[first] == label).sum() - (labels[second] == label).sum()) <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=10, max_size=120), st.integers(1, 2), st.integers(0, 5))
def test_tenths_share_out_every_class_to_within_one_row(values: list[int], tenths: int, seed: int) -> None:
    labels = np.array(values)
    parts = carve(len(labels), labels, seed, tenths)
    assert len(parts) == tenths + 1
    assert sorted(row for part in parts for row in part) == list(range(len(labels)))
    for part in parts[1:]:
        assert len(part) >= 1
        for label in set(values):
            assert abs((labels[part] == label).sum() - (labels == label).sum() / 10) <= 1


@pytest.mark.parametrize("labels", [LABELS, None])
def test_same_seed_same_rows_other_seed_other_rows(labels: np.ndarray | None) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(halve(200, labels, 3), halve(200, labels, 3)))
    assert not np.array_equal(halve(200, labels, 3)[0], halve(200, labels, 4)[0])
    assert not np.array_equal(carve(200, labels, 3, 2)[1], carve(200, labels, 4, 2)[1])


def test_labelled_test_split_is_used_whole_and_validation_selects() -> None:
    parts = assign({"train": LABELS, "validation": LABELS[:50], "test": LABELS[:30]}, True, 0)
    assert {name: (part.split, len(part.rows)) for name, part in parts.items()} == {
        "train": ("train", 200),
        "selection": ("validation", 50),
        "test": ("test", 30),
    }


def test_without_test_validation_is_halved() -> None:
    parts = assign({"train": LABELS, "validation": LABELS[:51]}, True, 0)
    assert len(parts["train"].rows) == 200
    assert parts["selection"].split == parts["test"].split == "validation"
    assert sorted([*parts["selection"].rows, *parts["test"].rows]) == list(range(51))
    assert parts["test"].origin == "half of validation"


@pytest.mark.parametrize("stratify", [True, False])
def test_without_validation_train_gives_a_tenth_each(stratify: bool) -> None:
    parts = assign({"train": LABELS}, stratify, 0)
    assert [len(parts[name].rows) for name in ("train", "selection", "test")] == [160, 20, 20]
    assert sorted(row for part in parts.values() for row in part.rows) == list(range(200))
    assert parts["train"].origin == "80 % of train"


def test_with_test_but_no_validation_only_selection_is_carved() -> None:
    parts = assign({"train": LABELS, "test": LABELS[:30]}, True, 0)
    assert parts["test"].split == "test"
    assert len(parts["test"].rows) == 30
    assert sorted([*parts["train"].rows, *parts["selection"].rows]) == list(range(200))
    assert len(parts["selection"].rows) == 20


def test_draws_are_nested_sorted_and_seeded() -> None:
    part = Part("train", np.arange(100, 200), "train")
    small, large = draw(part, 10, 0), draw(part, 30, 0)
    assert set(small.rows) < set(large.rows) <= set(part.rows)
    assert len(large.rows) == 30
    assert list(small.rows) == sorted(small.rows)
    assert not np.array_equal(small.rows, draw(part, 10, 1).rows)
    assert small.origin == "10 rows drawn from train"
