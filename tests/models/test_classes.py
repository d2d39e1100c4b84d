"""Class names: placeholders, and the mapping to a head's classes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from irdscale.errors import InputError
from irdscale.models.classes import are_placeholders, names_of, order_of, places_of


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], ["0", "1"], ["label 0", "Label-1"], []])
def test_numbers_in_their_own_order_are_placeholders(names: list[str]) -> None:
    assert are_placeholders(names)


@pytest.mark.parametrize("names", [["LABEL_1", "LABEL_0"], ["1", "2"], ["neg", "pos"], ["0", "pos"], ["class0", "1"]])
def test_whatever_else_says_something(names: list[str]) -> None:
    assert not are_placeholders(names)


@pytest.mark.parametrize(
    ("names", "head", "order"),
    [
        (["neg", "pos"], ["pos", "neg"], [1, 0]),
        (["entailment", "neutral", "contradiction"], ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [2, 1, 0]),
        (["not_entailment", "entailment"], ["entailment", "not-entailment"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["neg", "pos"], ["LABEL_0", "LABEL_1"], [0, 1]),
        (["0", "1"], ["pos", "neg"], [0, 1]),
        (["1", "0"], ["LABEL_0", "LABEL_1"], [1, 0]),
        (["0", "1", "10", "2"], ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_10"], [0, 1, 3, 2]),
        (["neg", "pos"], ["negative", "positive"], None),
        (["neg", "pos"], ["neg", "neutral", "pos"], None),
        (["a", "A"], ["a", "b"], None),
    ],
)
def test_classes_are_found_by_name_unless_a_side_has_none(
    names: list[str], head: list[str], order: list[int] | None
) -> None:
    assert order_of(names, head) == order


def test_some_of_the_known_names() -> None:
    assert places_of(["pos"], ["neg", "Pos"]) == [1]
    assert places_of(["pos"], ["neg", "Pos", "POS"]) is None


def test_names_of_a_configuration() -> None:
    def found(id2label: dict[int, str] | None, label2id: dict[str, int | str] | None = None) -> tuple[str, ...]:
        return names_of(SimpleNamespace(id2label=id2label, label2id=label2id), "config.json")

    assert found({1: "neg", 0: "pos"}) == ("pos", "neg")
    assert found({0: "LABEL_0", 1: "LABEL_1"}, {"pos": 0, "neg": "1"}) == ("pos", "neg")
    assert found({0: "pos", 1: "neg"}, {"LABEL_0": 0, "LABEL_1": 1}) == ("pos", "neg")
    assert found({0: "a", 1: "b", 2: "c"}, {"b": 0, "a": 1}) == ("a", "b", "c")
    assert found({0: "a", 1: "b"}, {"a": 0, "b": 2}) == ("a", "b")
    assert found(None) == ()
    with pytest.raises(
        InputError, match=r"id2label with the classes pos, neg and label2id with neg, pos; expected one"
    ):
        found({0: "pos", 1: "neg"}, {"neg": 0, "pos": 1})
