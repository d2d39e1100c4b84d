"""Which use of a file's rows is proposed, and when two are as likely."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from irdscale.errors import InputError
from irdscale.tasks.delimiters import found_delimiter
from irdscale.tasks.first_look import choose, look

TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
SHAREGPT = [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d"}]


def table(size: int = 30, **columns: Any) -> pa.Table:
    """Columns from functions of the row, or from the same value in every row."""
    return pa.table({k: [v(i) if callable(v) else v for i in range(size)] for k, v in columns.items()})


def text(word: str) -> Any:
    return lambda i: f"{word} number {i}"


def of(*values: Any) -> Any:
    return lambda i: values[i % len(values)]


def chosen(
    rows: pa.Table, kind: str | None = None, columns: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    found, _ = choose(rows, kind, columns, "my.jsonl")
    return found.kind, found.columns


@pytest.mark.parametrize(
    ("columns", "kind", "expected"),
    [
        ({"text": text("a"), "label": of("x", "y")}, "sequence-classification", {"text": ["text"], "label": "label"}),
        ({"id": lambda i: i, "review": text("a"), "sentiment": of(0, 1)}, "sequence-classification", None),
        ({"text": text("a"), "label": of(True, False)}, "sequence-classification", None),
        ({"text": text("a"), "score": lambda i: i / 7}, "regression", {"text": ["text"], "label": "score"}),
        ({"text": text("a"), "label": of(1, 2, 3, 4, 5)}, "regression", None),
        (
            {"premise": text("a"), "hypothesis": text("b"), "label": of(0, 1, 2)},
            "sequence-classification",
            {"text": ["premise", "hypothesis"], "label": "label"},
        ),
        ({"question": text("a"), "answer": text("b")}, "sft", {"prompt": "question", "completion": "answer"}),
        (
            {"system": "be kind", "prompt": text("a"), "response": text("b")},
            "sft",
            {"system": "system", "prompt": "prompt", "completion": "response"},
        ),
        (
            {"instruction": text("a"), "input": of("", "some words"), "output": text("b"), "text": text("c")},
            "sft",
            {"instruction": "instruction", "input": "input", "output": "output"},
        ),
        ({"messages": lambda i: TALK, "source": of("x", "y")}, "sft", {"messages": "messages"}),
        ({"conversations": lambda i: SHAREGPT, "tools": "[]"}, "sft", {"messages": "conversations", "tools": "tools"}),
        (
            {"question": text("a"), "choices": lambda i: ["a b", "c d"], "answer": of(0, 1)},
            "multiple-choice",
            {"prompt": "question", "choices": ["choices"], "label": "answer"},
        ),
        (
            {
                "question": text("a"),
                "choices": lambda i: {"text": ["a", "b"], "label": ["A", "B"]},
                "answerKey": of("A", "B"),
            },
            "multiple-choice",
            {"prompt": "question", "choices": ["choices"], "label": "answerKey"},
        ),
        (
            {"ctx": text("a"), "ending0": text("b"), "ending1": text("c"), "label": of(0, 1)},
            "multiple-choice",
            {"prompt": "ctx", "choices": ["ending0", "ending1"], "label": "label"},
        ),
        ({"text": text("a")}, "causal-lm", {"text": ["text"]}),
        ({"text": text("a"), "url": text("x")}, "causal-lm", {"text": ["text"]}),
        # The names of classes are taken before their numbers.
        ({"text": text("a"), "label": of(0, 1), "label_text": of("no", "yes")}, "sequence-classification", None),
    ],
)
def test_one_likely_use_is_chosen(columns: dict[str, Any], kind: str, expected: dict[str, Any] | None) -> None:
    found = chosen(table(**columns))
    assert found[0] == kind
    assert expected is None or found[1] == expected
    if "label_text" in columns:
        assert found[1]["label"] == "label_text"


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"review": text("a"), "stars": of(0, 1, 2)}, ["--task sequence-classification", "--task regression"]),
        ({"title": text("a"), "text": text("b"), "label": of(0, 1)}, ["{text: [text], label", "{text: [title, text]"]),
        ({"text": text("a"), "sentiment": of(0, 1), "topic": of(0, 1, 2)}, ["label: sentiment}", "label: topic}"]),
        ({"chosen": lambda i: TALK, "rejected": lambda i: TALK}, ["{messages: chosen}", "{messages: rejected}"]),
        ({"question": text("a"), "answer": of("yes", "no")}, ["--task sft", "--task sequence-classification"]),
        ({"a": text("a"), "b": text("b")}, ["{prompt: a, completion: b}", "{prompt: b, completion: a}", "{text: [a]}"]),
    ],
)
def test_two_likely_uses_are_listed_with_what_decides(columns: dict[str, Any], options: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        chosen(table(**columns))
    error = str(caught.value)
    assert error.startswith("my.jsonl: task: found ")
    assert all(option in error for option in options), error
    assert "\n" not in error


def test_an_option_decides() -> None:
    stars = table(review=text("a"), stars=of(0, 1, 2))
    assert chosen(stars, "regression") == ("regression", {"text": ["review"], "label": "stars"})
    titled = table(title=text("a"), text=text("b"), label=of(0, 1))
    assert chosen(titled, None, {"text": "text", "label": "label"})[1] == {"text": ["text"], "label": "label"}
    assert chosen(titled, None, {"text": ["title", "text"]})[1]["text"] == ["title", "text"]
    several = table(text=text("a"), sentiment=of(0, 1), topic=of(0, 1, 2))
    assert chosen(several, None, {"label": "topic"})[1] == {"text": ["text"], "label": "topic"}
    assert chosen(several, "causal-lm")[1] == {"text": ["text"]}
    unknown = table(a=text("a"), b=text("b"))
    assert chosen(unknown, None, {"prompt": "b", "completion": "a"})[0] == "sft"


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        (
            "sft",
            None,
            r"task.columns: found text \(texts\), label \(2 classes\); expected columns for sft \(prompt and",
        ),
        (None, {"label": "lable"}, r"task.columns.label: found no column 'lable' \(did you mean \"label\"\?\)"),
        (None, {"txt": "text"}, r"task.columns.txt: unknown key \(did you mean \"text\"\?\)"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str | None, columns: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen(table(text=text("a"), label=of(0, 1)), kind, columns)


def test_files_and_glue_tasks(tmp_path: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text;label\n" + "".join(f"a film, {i};{i % 2}\n" for i in range(30)))
    assert found_delimiter(path) == ";"
    found = look(str(path), None, {})
    assert (found.delimiter, found.rows, found.chosen.kind) == (";", 30, "sequence-classification")
    assert look("glue/rte", None, {}).chosen.why == "rte"
    with pytest.raises(
        InputError, match="--task: found 'sft'; expected 'sequence-classification', the kind of glue/rte"
    ):
        look("glue/rte", "sft", {})
    with pytest.raises(InputError, match="nowhere: --data: no such file or folder; expected a local one"):
        look("nowhere", None, {})
