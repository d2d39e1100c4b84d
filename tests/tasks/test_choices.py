"""Which choice a label means, by what the choices are called."""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow as pa
import pytest

from irdscale.config.task import ColumnsConfig, check_columns
from irdscale.tasks.choices import RightChoices, choice_texts
from irdscale.tasks.data import Rows
from tests.tasks.errors import refused

TEXTS = ["blue", "green", "yellow", "red"]
COLUMNS = {"prompt": "q", "choices": ["c"], "label": "y"}


def arc(labels: list[Any]) -> dict[str, Any]:
    return {"text": TEXTS[: len(labels)], "label": labels}


def found(rows: list[dict[str, Any]], names: list[str] | None = None, **columns: Any) -> list[int]:
    """The right choices' places; `names` are those of the classes that the label column declares."""
    table = pa.Table.from_pylist(rows)
    if names is not None:
        features = datasets.Features.from_arrow_schema(table.schema)
        features["y"] = datasets.ClassLabel(names=names)
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
    named = ColumnsConfig.model_validate({**COLUMNS, **columns})
    check_columns("multiple-choice", named)
    read = Rows("file", table)
    right = RightChoices(read, named, choice_texts(read, named.choices or []))
    return [right.number(row) for row in range(len(rows))]


@pytest.mark.parametrize(
    ("called", "label", "expected"),
    [
        (["1", "2", "3", "4"], "1", 0),
        (["1", "2", "3", "4"], "4", 3),
        (["A", "B", "C", "D"], "C", 2),
        (["D", "C", "B", "A"], "C", 1),
        (["A", "B", "C", "D"], "c", 2),
        ([1, 2, 3, 4], 4, 3),
        ([4, 3, 2, 1], "4", 0),
        (["1", "2", "3", "4"], 4, 3),
        (["1", "2", "3", "4"], 2.0, 1),
        (["x1", "x2", "x3"], "x3", 2),
        (["A", "B", "C", "D"], 3, 3),
        (["a", "A"], "A", 1),
    ],
)
def test_what_the_choices_are_called_decides(called: list[Any], label: Any, expected: int) -> None:
    assert found([{"q": "the sky is", "c": arc(called), "y": label}]) == [expected]
    as_list = [{"label": name, "text": text} for name, text in zip(called, TEXTS, strict=False)]
    assert found([{"q": "the sky is", "c": as_list, "y": label}]) == [expected]
    row = {"q": "the sky is", "c": TEXTS[: len(called)], "keys": called, "y": label}
    assert found([row], choice_labels="keys") == [expected]
    apart = {"q": "the sky is", "c": {"text": TEXTS[: len(called)], "key": called}, "y": label}
    assert found([apart], choice_labels=["c.key"]) == [expected]


def test_letters_and_numbers_in_one_data_set() -> None:
    rows = [arc(["1", "2", "3"]), arc(["A", "B", "C"]), arc(["B", "A"])]
    assert found([{"q": "", "c": c, "y": y} for c, y in zip(rows, ["3", "A", "A"], strict=True)]) == [2, 0, 1]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([0, 3], [0, 3]), (["0", "3"], [0, 3]), (["A", "D"], [0, 3]), (["b", "c"], [1, 2]), ([1.0, 2.0], [1, 2])],
)
def test_choices_without_names_are_counted(labels: list[Any], expected: list[int]) -> None:
    assert found([{"q": "", "c": TEXTS, "y": label} for label in labels]) == expected
    assert found([{"q": "", "c": {"text": TEXTS}, "y": label} for label in labels]) == expected


def test_columns_are_choices_called_by_their_names() -> None:
    rows = [{"q": "", "A": "x", "B": "y", "C": "z", "y": label} for label in "AC"]
    assert found(rows, choices=["C", "A", "B"]) == [1, 0]
    counted = [{**row, "y": number, "one": "1", "two": "2"} for row, number in zip(rows, [1, 2], strict=True)]
    assert found(counted, choices=["A", "B"], choice_labels=["one", "two"]) == [0, 1]


@pytest.mark.parametrize(
    ("names", "called", "expected"),
    [
        (["A", "B", "C", "D"], None, [0, 3]),
        (["D", "C", "B", "A"], None, [3, 0]),
        (["3", "2", "1", "0"], None, [3, 0]),
        (["1", "2", "3", "4"], None, [0, 3]),
        (["1", "2", "3", "4"], ["4", "3", "2", "1"], [3, 0]),
        (["0", "1", "2", "3"], ["A", "B", "C", "D"], [0, 3]),
    ],
)
def test_declared_names_of_labels(names: list[str], called: list[str] | None, expected: list[int]) -> None:
    choices: Any = TEXTS if called is None else arc(called)
    assert found([{"q": "", "c": choices, "y": label} for label in (0, 3)], names) == expected


@pytest.mark.parametrize(
    ("choices", "label", "match"),
    [
        (arc(["1", "2", "3", "4"]), "0", "row 0: found '0'; expected one of the choices' own labels, .*: 1, 2, 3, 4"),
        (arc(["1", "2", "3", "4"]), "A", "row 0: found 'A'; expected one of the choices' own labels"),
        (arc(["A", "B", "C", "D"]), "1", "row 0: found '1'; expected one of the choices' own labels"),
        (arc(["A", "A", "B"]), "A", "row 0: found 'A'; expected one of the choices' own labels, each once"),
        (arc(["1", "2"]), None, "row 0: found None"),
        (
            {"text": TEXTS, "label": ["A", "B"]},
            "A",
            r"file, row 0: found \['A', 'B'\]; expected labels of",
        ),
        ({"text": TEXTS, "label": ["A", "B", None, "D"]}, "A", "file, row 0: found \\[.*; expected labels of"),
        (TEXTS, 4, "row 0: found 4; expected the right choice's number, 0 to 3, or task.columns.choice_labels"),
        (TEXTS, "E", "row 0: found 'E'; expected the right choice's number"),
        (TEXTS, "blue", "row 0: found 'blue'; expected the right choice's number"),
        (TEXTS, True, "row 0: found True; expected the right choice's number"),
        (TEXTS, 1.5, "row 0: found 1.5; expected the right choice's number"),
    ],
)
def test_labels_that_mean_no_choice(choices: Any, label: Any, match: str) -> None:
    key = "task.columns.choice_labels" if "expected labels of" in match else "task.columns.label"
    with refused(match, key):
        found([{"q": "", "c": choices, "y": label}])


def test_one_row_tells_that_labels_count_from_one() -> None:
    table = pa.Table.from_pylist([{"q": "", "c": ["x", "y"], "y": label} for label in ("1", "1", "2")])
    with refused(r"row 2: found '2'; expected .* 0 to 1, or task.columns.choice_labels"):
        RightChoices(Rows("file", table), ColumnsConfig.model_validate(COLUMNS), [["x", "y"]] * 3)
