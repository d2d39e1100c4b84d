"""Chats of a data set as lists of messages, from {role, content}, ShareGPT, Alpaca or columns of text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from irdscale.config.task import ColumnsConfig
from irdscale.errors import InputError, kind_of
from irdscale.tasks.chat_templates import Message
from irdscale.tasks.data import Rows

# Names of roles in ShareGPT data sets.
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
    "system": "system",
}


@dataclass(frozen=True)
class Conversation:
    """A row's chat, which ends with a message of the assistant.

    Attributes:
        where: name of the row and its column, for errors.
        messages: role, content and other fields of each message.
        tools: JSON schemas of the functions that the assistant may call.
    """

    where: str
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


def conversations(rows: Rows, columns: ColumnsConfig) -> Callable[[int], Conversation]:
    """Return a function that reads a row's chat; it raises InputError if the row holds none, and names the row.

    Raises:
        InputError: a column is missing or of the wrong type.
    """
    if columns.messages is None:
        return _pairs(rows, columns)
    name, tools = columns.messages, columns.tools
    chats = rows.column(name, "messages")
    given = None if tools is None else rows.column(tools, "tools")

    def read(row: int) -> Conversation:
        where = f"task.columns.messages: {rows.where}: column {name!r}, row {row}"
        messages = chat_messages(chats, row, where)
        if given is None:
            return Conversation(where, messages)
        return Conversation(where, messages, chat_tools(given, row, f"{rows.where}: column {tools!r}, row {row}"))

    return read


def _pairs(rows: Rows, columns: ColumnsConfig) -> Callable[[int], Conversation]:
    """Chats of one question and one answer: Alpaca's columns, or a system prompt, a prompt and a completion."""
    asks, answers = ("instruction", "output") if columns.instruction is not None else ("prompt", "completion")
    named = {key: names[0] for key, names in columns.named().items()}
    texts = {key: rows.texts(named[key], key) for key in (asks, answers)}
    more = {key: _texts_or_none(rows, named[key], key) for key in ("system", "input") if key in named}

    def read(row: int) -> Conversation:
        where = f"task.columns.{answers}: {rows.where}: column {named[answers]!r}, row {row}"
        if not texts[answers][row].strip():
            place = f"{rows.where}: column {named[answers]!r}, row {row}"
            raise InputError("found no text", "some, to learn from", f"task.columns.{answers}", place)
        said = {key: values[row] for key, values in more.items() if values[row].strip()}
        question = "\n\n".join([texts[asks][row], *([said["input"]] if "input" in said else [])])
        system = [{"role": "system", "content": said["system"]}] if "system" in said else []
        user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": texts[answers][row]}
        return Conversation(where, [*system, user, assistant])

    return read


def _texts_or_none(rows: Rows, name: str, key: str) -> list[str]:
    """A column of texts; null becomes the empty text."""
    column = rows.column(name, key)
    if not pa.types.is_null(column.type):
        # The type of the values that are not null is checked.
        Rows(rows.where, pa.table({name: column.drop_null()})).texts(name, key)
    return [value or "" for value in column.to_pylist()]


def chat_messages(column: pa.ChunkedArray, row: int, where: str) -> list[Message]:
    """A row's chat, up to its last message of the assistant.

    Messages of ShareGPT (from, value) get a role and a content. Null fields are removed: a table gives every struct the
    fields of all structs.

    Raises:
        InputError: the value is not a list of messages, or none of them is the assistant's.
    """
    value = _without_nulls(column[row].as_py(), column.type)
    if not isinstance(value, list) or not value:
        raise InputError(f"found {kind_of(value)}", "a list of {role, content}", where=where)
    messages: list[Message] = [_message(each, f"{where}: message {number}") for number, each in enumerate(value)]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise InputError("found no message of the role assistant", "one, to learn from", where=where)
    return messages


def _message(value: Any, where: str) -> Message:
    if isinstance(value, dict) and "role" not in value and isinstance(value.get("from"), str):
        return _sharegpt(value, where)
    if not _is_message(value):
        raise InputError(f"found {value!r}", "a role and a content, as text", where=where)
    return dict(value)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    # A message that calls tools may have no content.
    return isinstance(value.get("content"), str) or ("content" not in value and bool(value.get("tool_calls")))


def _sharegpt(value: dict[str, Any], where: str) -> Message:
    """Convert a message of ShareGPT to role and content; a `function_call`, whose value is JSON, becomes tool calls."""
    said, rest = value["from"], {key: each for key, each in value.items() if key not in ("from", "value")}
    if said not in _ROLES:
        raise InputError(f"found from {said!r}", f"one of {', '.join(_ROLES)}", where=where)
    if not isinstance(value.get("value"), str):
        raise InputError(f"found value {kind_of(value.get('value'))}", "some text", where=where)
    message = {"role": _ROLES[said], "content": value["value"], **rest}
    if said == "function_call":
        calls = _json(value["value"], where)
        functions = calls if isinstance(calls, list) else [calls]
        message = {**message, "content": "", "tool_calls": [{"type": "function", "function": f} for f in functions]}
    return message


def chat_tools(column: pa.ChunkedArray, row: int, where: str) -> list[dict[str, Any]]:
    """JSON schemas of the functions that a row's assistant may call, from a list or its JSON text; null gives none.

    Raises:
        InputError: the value is something else.
    """
    value = _without_nulls(column[row].as_py(), column.type)
    key = "task.columns.tools"
    if isinstance(value, str):
        value = _json(value, where, key) if value.strip() else []
    listed = value if isinstance(value, list) else []
    tools = [_json(each, where, key) if isinstance(each, str) else each for each in listed]
    if not isinstance(value, (list, type(None))) or not all(isinstance(each, dict) for each in tools):
        raise InputError(f"found {kind_of(value)}", "a list of functions, each as a JSON object", key, where)
    return tools


def _json(text: str, where: str, key: str = "") -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"found {text[:40]!r}", f"JSON ({error})", key, where) from None


def _without_nulls(value: Any, kind: pa.DataType | None = None) -> Any:
    """Remove null fields at every depth, but no elements of lists; JSON and map types become Python values."""
    inner = getattr(kind, "value_type", None)
    if isinstance(value, str) and isinstance(kind, getattr(pa, "JsonType", ())):
        return _without_nulls(json.loads(value))
    if kind is not None and pa.types.is_map(kind):
        return {key: _without_nulls(each, kind.item_type) for key, each in value or () if each is not None}
    if isinstance(value, dict):
        kinds = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if kind is not None else {}
        return {key: _without_nulls(each, kinds.get(key)) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each, inner) for each in value]
    return value
