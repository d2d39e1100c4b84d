"""Kinds of task and columns that suit the rows of a file, for a first configuration.

Names of columns that many data sets share and the values decide. `rank` orders what is found: 0 where names and values
agree, 1 where only the types of the values fit, 2 for plain texts beside a better use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pyarrow as pa

from irdscale.config.kinds import Kind
from irdscale.tasks.column_profiles import Column, columns_of

_CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
_TOOLS = ("tools", "functions")
_TEXTS = ("text", "sentence", "review", "content", "document", "body", "comment", "tweet", "utterance", "article")
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
    ("question", "sentence"),
    ("query", "passage"),
    ("query", "document"),
)
_LABELS = (
    *("label", "labels", "class", "category", "sentiment", "intent", "emotion", "topic", "tag", "target", "gold_label"),
    *("y", "is_duplicate", "label_text", "coarse_label", "fine_label"),
)
_VALUES = ("score", "scores", "rating", "stars", "similarity", "similarity_score", "value", "grade", "points", "price")
_PROMPTS = ("prompt", "question", "query", "instruction", "problem", "source", "input")
_ANSWERS = ("completion", "answer", "response", "output", "solution", "target", "reply")
_INSTRUCTION, _INPUTS, _OUTPUTS = "instruction", ("input", "context"), ("output", "response")
_CHOICES = ("choices", "options", "endings", "candidates", "answers")
_CHOICE_STEMS = ("", "choice", "option", "ending", "sol", "alternative", "answer", "op", "candidate")
_RIGHT = ("label", "answer", "answerkey", "answer_key", "answer_idx", "answer_index", "correct", "gold", "cop")
_ASKED = (*_PROMPTS, "goal", "ctx", "context", "sentence", "stem", "premise", "text")


@dataclass(frozen=True)
class Proposal:
    """A kind of task with its columns.

    Attributes:
        kind: None for a GLUE task, which has its own kind and columns.
        columns: values of `task.columns`.
        why: what speaks for it.
        rank: see the module.
    """

    kind: Kind | None
    columns: dict[str, Any]
    why: str
    rank: int = 0


def propose(table: pa.Table) -> list[Proposal]:
    """The uses of a table's rows, the likeliest first."""
    columns = columns_of(table)
    found = [*_chats(columns), *_pairs(columns), *_choices(columns)]
    answers = {each.columns[key] for each in found for key in ("completion", "output") if key in each.columns}
    # Answers with few different values may be classes too.
    labelled = list(_labelled(columns, answers))
    if any(each.kind == "multiple-choice" and each.rank == 0 for each in found):
        labelled = [replace(each, rank=max(each.rank, 1)) for each in labelled]
    found += labelled
    texts = [column for column in columns if column.is_prose] or [c for c in columns if c.is_text and not c.is_id]
    alone = 0 if len(texts) == 1 else 1
    named = [column for column in texts if column.plain in _TEXTS]
    best = min((each.rank for each in found), default=3)
    for column in texts:
        own = 2 if best < 2 else 0 if len(named) == 1 and column in named else alone
        found.append(Proposal("causal-lm", {"text": [column.name]}, f"texts in {column.name!r}", own))
    if best == 3 and len(texts) == 2:
        for first, second in (texts, texts[::-1]):
            why = f"{second.name!r} after {first.name!r}"
            found.append(Proposal("sft", {"prompt": first.name, "completion": second.name}, why, 1))
    return sorted(found, key=lambda each: each.rank)


def names_of(proposal: Proposal) -> list[str]:
    """The columns that a proposal names."""
    given = proposal.columns.values()
    return [name for value in given for name in (value if isinstance(value, list) else [value])]


def label_kinds(column: Column) -> list[tuple[Kind, str]]:
    """Kinds that a column of labels allows, with what its values say."""
    values = sorted({value for value in column.values if isinstance(value, (int, float))})
    span = f"numbers from {values[0]:g} to {values[-1]:g} in {column.name!r}" if values else ""
    if column.declared is not None or column.are_class_names:
        count = len(column.declared) if column.declared is not None else column.distinct
        return [("sequence-classification", f"{count} classes in {column.name!r}")]
    if column.are_class_numbers:
        classes: tuple[Kind, str] = ("sequence-classification", f"{column.distinct} classes in {column.name!r}")
        return [classes, ("regression", span)] if column.plain in _VALUES and column.distinct > 2 else [classes]
    if column.is_number and not pa.types.is_boolean(column.type):
        return [("regression", span)] if column.distinct > 1 else []
    return [("sequence-classification", f"2 classes in {column.name!r}")] if column.distinct == 2 else []


def _named(columns: list[Column], names: tuple[str, ...]) -> list[Column]:
    """The columns with one of these names, in the order of the names."""
    return [column for name in names for column in columns if column.plain == name]


def _chats(columns: list[Column]) -> Iterator[Proposal]:
    tools = next((column.name for column in _named(columns, _TOOLS) if not column.is_number), None)
    for column in columns:
        if column.is_chat:
            used = {"messages": column.name, **({"tools": tools} if tools else {})}
            yield Proposal("sft", used, f"chats in {column.name!r}", int(column.plain not in _CHATS))


def _pairs(columns: list[Column]) -> Iterator[Proposal]:
    """Alpaca's columns, and prompts with completions."""
    texts = [column for column in columns if column.is_text]
    asked, said = _named(texts, (_INSTRUCTION,)), _named(texts, _OUTPUTS)
    if asked and said:
        more = [column.name for column in _named(texts, _INPUTS)[:1]]
        used = {"instruction": asked[0].name, **dict(zip(("input",), more)), "output": said[0].name}
        yield Proposal("sft", used, "instructions and answers (Alpaca)")
        return
    system = [column.name for column in _named(texts, ("system", "system_prompt"))[:1]]
    for first, second in product(_named(texts, _PROMPTS), _named(texts, _ANSWERS)):
        used = {**dict(zip(("system",), system)), "prompt": first.name, "completion": second.name}
        yield Proposal("sft", used, f"{second.name!r} answers {first.name!r}")


def _choices(columns: list[Column]) -> Iterator[Proposal]:
    asked = _named([column for column in columns if column.is_text], _ASKED)
    right = _named([column for column in columns if column.is_text or column.is_number], _RIGHT)
    lists = [[column.name] for column in columns if column.are_choices and column.plain in _CHOICES]
    for chosen in lists or list(_choice_columns(columns)):
        pairs = [(a, r) for a, r in product(asked[:1], right) if a.name not in chosen and r.name not in chosen]
        for prompt, label in pairs:
            used = {"prompt": prompt.name, "choices": chosen, "label": label.name}
            yield Proposal("multiple-choice", used, f"choices in {', '.join(map(repr, chosen))}")


def _choice_columns(columns: list[Column]) -> Iterator[list[str]]:
    """Groups of columns such as ending0 to ending3, or A to D."""
    groups: dict[str, list[str]] = {}
    for column in columns:
        match = re.fullmatch(r"(.*?)[_ -]?([0-9]|[a-e])", column.plain)
        if column.is_text and match is not None and match[1] in _CHOICE_STEMS:
            groups.setdefault(match[1], []).append(column.name)
    yield from (names for names in groups.values() if len(names) > 1)


def _labelled(columns: list[Column], answers: set[str]) -> Iterator[Proposal]:
    """Texts with classes or values."""
    labels = _distinct_labels([column for column in columns if label_kinds(column) and not column.is_id])
    for label in labels:
        by_name = label.plain in (*_LABELS, *_VALUES) or label.name in answers
        for texts, fits in _text_sets([column for column in columns if column.name != label.name]):
            for kind, why in label_kinds(label):
                rank = 0 if by_name and fits else 1
                yield Proposal(kind, {"text": texts, "label": label.name}, why, rank)


def _distinct_labels(labels: list[Column]) -> list[Column]:
    """The columns without those that say the same as another; names of classes are kept before their numbers."""
    kept: list[Column] = []
    for column in sorted(labels, key=lambda column: not column.is_text):
        same = (each for each in kept if len(each.values) == len(column.values))
        if not any(
            len(set(zip(map(str, o.values), map(str, column.values)))) == o.distinct == column.distinct for o in same
        ):
            kept.append(column)
    return kept


def _text_sets(columns: list[Column]) -> Iterator[tuple[list[str], bool]]:
    """Columns to read as one text or as a pair, and whether their names or their number say so."""
    texts = [column for column in columns if column.is_prose]
    texts = texts or [column for column in columns if column.is_text and not column.is_id]
    for first, second in _PAIRS:
        pair = [*_named(texts, (first,)), *_named(texts, (second,))]
        if len(pair) == 2:
            yield [column.name for column in pair], True
            return
    named = _named(texts, _TEXTS)
    if len(texts) == 2 and len(named) < 2:
        # A title and a text, for example: one of them, or both.
        yield [column.name for column in named or texts[:1]], True
        yield [column.name for column in texts], True
        return
    for column in texts:
        yield [column.name], len(texts) == 1 or (column in named)
