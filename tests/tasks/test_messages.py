"""Chats as data sets hold them: lists of messages, ShareGPT's, Alpaca's, texts with a system prompt, and tools."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from irdscale.config.task import ColumnsConfig
from irdscale.errors import InputError
from irdscale.tasks.data import Rows
from irdscale.tasks.messages import conversations


def read(rows: list[dict[str, Any]], **columns: str) -> list[Any]:
    table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in {**rows[0], **rows[-1]}})
    found = conversations(Rows("some.jsonl", table), ColumnsConfig(**columns))  # type: ignore[arg-type]
    return [found(row) for row in range(len(rows))]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}


def test_messages_of_sharegpt() -> None:
    rows = [
        [("system", "Be brief."), ("human", "Where?"), ("gpt", "Paris"), ("human", "more")],
        [
            ("user", "Rain?"),
            ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
            ("observation", "no"),
            ("gpt", "No"),
        ],
    ]
    first, second = read([{"c": [{"from": who, "value": text} for who, text in row]} for row in rows], messages="c")
    assert first.messages == [SYSTEM, user("Where?"), assistant("Paris")]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert second.messages == [
        user("Rain?"),
        {**assistant(""), "tool_calls": [call]},
        {"role": "tool", "content": "no"},
        assistant("No"),
    ]


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"from": "bard?", "value": "a"}, r"message 0: found from 'bard\?'; expected one of user, human"),
        ({"from": "gpt", "value": None}, "message 0: found value nothing; expected some text"),
        ({"from": "human", "value": "a"}, "found no message of the role assistant; expected one, to learn from"),
        ({"from": "function_call", "value": "f(1)"}, r"message 0: found 'f\(1\)'; expected JSON"),
        ({"who": "gpt", "value": "a"}, "message 0: found .*; expected a role and a content, as text"),
    ],
)
def test_messages_of_sharegpt_that_are_none(message: dict[str, Any], fault: str) -> None:
    with pytest.raises(
        InputError, match=rf"^task\.columns\.messages: some\.jsonl: column 'c', row 0: {fault}"
    ) as found:
        read([{"c": [message]}], messages="c")
    assert "\n" not in str(found.value)


def test_instructions_of_alpaca() -> None:
    rows = [{"i": "Add.", "x": "1 + 1", "o": "2"}, {"i": "Greet.", "x": "", "o": "Hi"}, {"i": "Greet.", "o": "Hi"}]
    columns = {"instruction": "i", "input": "x", "output": "o"}
    assert [found.messages for found in read(rows, **columns)] == [
        [user("Add.\n\n1 + 1"), assistant("2")],
        [user("Greet."), assistant("Hi")],
        [user("Greet."), assistant("Hi")],
    ]
    (found,) = read([{"i": "Greet.", "x": None, "o": "Hi"}], **columns)
    assert found.messages == [user("Greet."), assistant("Hi")]
    (found,) = read([{"i": "Greet.", "o": "Hi"}], instruction="i", output="o")
    assert found.messages == [user("Greet."), assistant("Hi")]
    with pytest.raises(
        InputError, match=r"^some\.jsonl: column 'o', row 1: task\.columns\.output: found no text; expec"
    ):
        read([rows[0], {"i": "Add.", "x": "", "o": " "}], **columns)
    with pytest.raises(InputError, match=r"task\.columns\.instruction: (.*row 0: )?found no text"):
        read([{"i": None, "x": "", "o": "a"}, rows[0]], **columns)


def test_prompts_with_a_system_prompt() -> None:
    rows = [{"s": "Be brief.", "p": "Where?", "c": "Paris"}, {"s": None, "p": "Where?", "c": "Rome"}]
    found = read(rows, system="s", prompt="p", completion="c")
    assert [each.messages for each in found] == [
        [SYSTEM, user("Where?"), assistant("Paris")],
        [user("Where?"), assistant("Rome")],
    ]
    with pytest.raises(InputError, match=r"^some\.jsonl: column 'c', row 0: task\.columns\.completion: found no text"):
        read([{"s": "a", "p": "b", "c": ""}], system="s", prompt="p", completion="c")
    with pytest.raises(InputError, match=r"task\.columns\.system: (.*column 's': )?found int64; expected text"):
        read([{"s": 1, "p": "b", "c": "c"}], system="s", prompt="p", completion="c")


def test_tools_are_nested_or_their_text() -> None:
    tools = [
        [{"function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}}],
        [{"function": {"name": "g", "parameters": {"properties": {"day": {"type": "integer", "enum": [1]}}}}}],
    ]
    chat = [user("a"), assistant("b")]
    found = read([{"m": chat, "t": each} for each in [*tools, None]], messages="m", tools="t")
    assert [each.tools for each in found] == [*tools, []]
    written = [json.dumps(tools[0]), "", None]
    found = read([{"m": chat, "t": text} for text in written], messages="m", tools="t")
    assert [each.tools for each in found] == [tools[0], [], []]
    (each,) = read([{"m": chat, "t": [json.dumps(tool) for tool in tools[0]]}], messages="m", tools="t")
    assert each.tools == tools[0]
    for value, fault in (
        ("{", r"found '\{'; expected JSON"),
        ("[1]", "found list; expected a list"),
        (7, "found int; "),
        ('{"a": 1}', "found dict; expected a list of functions, each as a JSON object"),
    ):
        with pytest.raises(InputError, match=rf"^some\.jsonl: column 't', row 0: task\.columns\.tools: {fault}"):
            read([{"m": chat, "t": value}], messages="m", tools="t")
