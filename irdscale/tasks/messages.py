"""The chats of a data set as lists of messages: of role and content."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from irdscale.errors import InputError, kind_of
from irdscale.tasks.chat_templates import Message


def chat_messages(column: pa.ChunkedArray, row: int, where: str) -> list[Message]:
    """A row's chat, up to its last message of the assistant, without the fields that hold nothing.

    Tables give every struct the fields of all of them, and null where a row has no such field.

    Raises:
        InputError: it is no list of messages, or none of them is the assistant's.
    """
    value = _without_nulls(column[row].as_py(), column.type)
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: found {kind_of(value)}; expected a list of {{role, content}}")
    messages: list[Message] = [_message(each, f"{where}: message {number}") for number, each in enumerate(value)]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise InputError(f"{where}: found no message of the role assistant; expected one, to learn from")
    return messages


def _message(value: Any, where: str) -> Message:
    if not _is_message(value):
        raise InputError(f"{where}: found {value!r}; expected a role and a content, as text")
    return dict(value)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    # A message that calls tools may say nothing.
    return isinstance(value.get("content"), str) or ("content" not in value and bool(value.get("tool_calls")))


def _without_nulls(value: Any, kind: pa.DataType | None = None) -> Any:
    """The value without the fields that are null, at every depth; elements of lists stay. Reads JSON and map types."""
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
