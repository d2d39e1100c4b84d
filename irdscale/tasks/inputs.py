"""Samples to predict, from a file with the columns of a task, or from one text. Labels and answers are not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa

from irdscale.config.schema import RunConfig
from irdscale.config.task import ColumnsConfig
from irdscale.errors import InputError
from irdscale.tasks.choices import choice_texts
from irdscale.tasks.data import Rows, read_rows
from irdscale.tasks.language import language_samples
from irdscale.tasks.sources import Source, find_source
from irdscale.tasks.splits import Part
from irdscale.tasks.tokens import encode

if TYPE_CHECKING:
    from irdscale.tasks.task import Task

# Samples are made as for training, with this text as the answer.
_STAND_IN = "0"
# Keys of the columns of answers, and of questions.
_ANSWERS = ("completion", "output")
_QUESTIONS = ("prompt", "instruction")
_KEY = "input"


def file_samples(config: RunConfig, task: Task, file: str) -> datasets.Dataset:
    """One sample for each row of a file, in its order; `row` counts from 0.

    Args:
        file: parquet, JSONL, JSON or CSV, with the columns of `task.columns`; labels and answers may be missing.

    Returns:
        The columns of `task.test`; for causal-lm and sft those of `prompts_of`.

    Raises:
        InputError: the file is missing or cannot be read; a column is missing or of the wrong type; or a row has no
            prompt, or does not fit `task.max_length`.
    """
    path, source = Path(file).expanduser(), find_source(config.task)
    if not path.is_file():
        raise InputError("found a folder" if path.is_dir() else "no such file", "a file", _KEY, file)
    try:
        (rows,) = read_rows(replace(source, glue=None, path=path, hub=None)).values()
    except InputError as error:
        if error.key != "task.dataset":
            raise
        raise InputError(error.found, error.expected, _KEY, error.where) from error
    return _samples(config, task, source, rows)


def text_samples(config: RunConfig, task: Task, text: str) -> datasets.Dataset:
    """One sample from one text: the text to classify or continue, the prompt, or the user's message.

    Returns:
        As `file_samples`.

    Raises:
        InputError: a sample of this task has several texts.
    """
    source = find_source(config.task)
    columns = source.columns
    if len(columns.text or ()) > 1 or columns.choices is not None:
        fault, expected = "found one text", "input=FILE: samples of this task are several texts"
        raise InputError(fault, expected, "text")
    values: dict[str, Any] = {}
    if columns.text is not None:
        values[columns.text[0]] = text
    elif columns.messages is not None:
        values[columns.messages] = [{"role": "user", "content": text}]
    for key, (name, *_) in columns.named().items():
        if key in _QUESTIONS:
            values[name] = text
        elif key not in (*_ANSWERS, "text", "label"):
            values.setdefault(name, None)
    table = pa.table({name: pa.array([value]) for name, value in values.items()})
    return _samples(config, task, source, Rows("text", table))


def _samples(config: RunConfig, task: Task, source: Source, rows: Rows) -> datasets.Dataset:
    columns, size = source.columns, rows.table.num_rows
    part = Part("input", np.arange(size), "input")
    if not task.is_language:
        texts = [rows.texts(name, "text") for name in columns.text or ()]
        segments = "token_type_ids" in task.test.column_names
        none = np.zeros(size, dtype=np.int64)
        return encode(task.tokenizer, texts, none, part, config.task.max_length, segments, rows.where)
    if task.kind == "causal-lm":
        assert columns.text is not None
        return _text_prompts(task, rows, columns.text[0], config.task.max_length)
    if task.kind == "multiple-choice":
        rows, columns = _with_first_choices(rows, columns)
    else:
        rows = _with_stand_ins(rows, columns)
    samples = language_samples(source.kind, task.tokenizer, rows, part, config.task, columns)
    for row, prompt in zip(samples["row"], samples["prompt_length"], strict=True):
        if prompt == 0:
            key = next((key for key in ("prompt", "messages", "instruction") if key in columns.named()), "prompt")
            raise InputError(
                "found a prompt without tokens", "some text", f"task.columns.{key}", f"{rows.where}, row {row}"
            )
    return samples


def prompts_of(task: Task, samples: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """The prompts of a split: its samples, or for causal-lm one prompt for each text.

    Args:
        max_length: most tokens of a text; the last ones are kept.

    Returns:
        At least columns `row`, `input_ids` and `prompt_length`.
    """
    if task.kind != "causal-lm":
        return samples
    texts: dict[int, list[int]] = {}
    for row, tokens in zip(samples["row"], samples["input_ids"], strict=True):
        texts.setdefault(row, []).extend(tokens)
    return _as_prompts(task, texts, max_length)


def _text_prompts(task: Task, rows: Rows, column: str, max_length: int) -> datasets.Dataset:
    texts: list[str] = rows.texts(column, "text")
    for row, text in enumerate(texts):
        if not text.strip():
            raise InputError("found no text", "some, to go on from", "task.columns.text", f"{rows.where}, row {row}")
    encoded = task.tokenizer(texts, verbose=False)["input_ids"]
    return _as_prompts(task, dict(enumerate(encoded)), max_length)


def _as_prompts(task: Task, texts: dict[int, list[int]], max_length: int) -> datasets.Dataset:
    """Prompts from texts: without the end-of-sequence token, cut from the left to `max_length` tokens."""
    end, begin = task.tokenizer.eos_token_id, task.tokenizer.bos_token_id
    prompts = []
    for tokens in texts.values():
        tokens = tokens[:-1] if len(tokens) > 1 and tokens[-1] == end else tokens
        first = tokens[:1] if tokens[0] == begin else []
        kept = max_length - len(first)
        prompts.append(tokens if len(tokens) <= max_length else [*first, *tokens[-kept:]])
    arrays = {
        "row": pa.array(list(texts), pa.int64()),
        "input_ids": pa.array(prompts, pa.list_(pa.int32())),
        "prompt_length": pa.array([len(prompt) for prompt in prompts]),
    }
    return datasets.Dataset(pa.table(arrays))


def _with_first_choices(rows: Rows, columns: ColumnsConfig) -> tuple[Rows, ColumnsConfig]:
    """The rows with the first choice as the right one, and the columns to read them by."""
    assert columns.prompt is not None
    choices = choice_texts(rows, columns.choices or [])
    values = {"prompt": rows.column(columns.prompt, "prompt"), "choices": pa.array(choices, pa.list_(pa.string()))}
    table = pa.table({**values, "label": pa.array([0] * len(choices))})
    # Errors about the prompt name the user's column.
    table = table.rename_columns(
        [columns.prompt, *(_other_name(columns.prompt, name) for name in ("choices", "label"))]
    )
    names = table.column_names
    return Rows(rows.where, table), ColumnsConfig(prompt=names[0], choices=[names[1]], label=names[2])


def _other_name(taken: str, name: str) -> str:
    return name if name != taken else f"{name}_"


def _with_stand_ins(rows: Rows, columns: ColumnsConfig) -> Rows:
    """The rows with `_STAND_IN` as every completion, and as the last message of every chat."""
    named = columns.named()
    for key in _ANSWERS:
        if key in named:
            rows = _with_column(rows, named[key][0], pa.array([_STAND_IN] * rows.table.num_rows))
    if columns.messages is not None:
        column = rows.column(columns.messages, "messages")
        rows = _with_column(rows, columns.messages, _with_last_answer(column))
    return rows


def _with_column(rows: Rows, name: str, values: pa.Array | pa.ChunkedArray) -> Rows:
    table, names = rows.table, rows.table.column_names
    if name in names:
        return Rows(rows.where, table.set_column(names.index(name), name, values))
    return Rows(rows.where, table.append_column(name, values))


def _with_last_answer(column: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Chats with `_STAND_IN` as the last message; it replaces the last message if that is the assistant's."""
    if not _holds_structs(column.type):
        return column
    fields = [column.type.value_type.field(i).name for i in range(column.type.value_type.num_fields)]
    role, content, own = ("role", "content", "assistant") if "role" in fields else ("from", "value", "gpt")
    chats = column.to_pylist()
    if not {role, content} <= set(fields):
        return column
    for chat in chats:
        if isinstance(chat, list):
            _set_last_answer(chat, {role: own, content: _STAND_IN}, role)
    return pa.array(chats, column.type)


def _holds_structs(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)


def _set_last_answer(chat: list[Any], answer: dict[str, str], role: str) -> None:
    answered: Sequence[str] = ("assistant", "gpt")
    if chat and isinstance(chat[-1], dict) and chat[-1].get(role) in answered:
        chat.pop()
    if chat:
        chat.append(answer)
