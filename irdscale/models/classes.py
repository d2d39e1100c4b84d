"""Class names: placeholders, spellings, and the mapping of a data set's classes to those of a trained head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from irdscale.errors import InputError

SHOWN = 8
_NUMBERED = re.compile(r"label[\s_-]*(?=\d+$)")
_SPACES = re.compile(r"[\s_-]+")


@dataclass(frozen=True)
class HeadClasses:
    """The classes of a trained head.

    Attributes:
        where: owner of the head, for messages
        kind: kind of task, such as `sequence-classification` or `regression`; None if unknown
        names: classes in the order of the head's outputs; empty for a head without classes
        counted: classes in the order in which metrics number them, if the head sets it
    """

    where: str
    kind: str | None
    names: tuple[str, ...]
    counted: tuple[str, ...] = ()


def listed(values: Sequence[Any]) -> str:
    """The first few values, for a message."""
    text = ", ".join(str(value) for value in values[:SHOWN])
    return text if len(values) <= SHOWN else f"{text}, ... ({len(values)} in all)"


def _plain(name: str) -> str:
    """A class name without case, separators and the word of `LABEL_0`."""
    name = _SPACES.sub(" ", str(name).strip().casefold())
    return _NUMBERED.sub("", name)


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether the names are only numbers, such as `LABEL_0`, `LABEL_1`, or `0`, `1`."""
    return all(_plain(name) == str(number) for number, name in enumerate(names))


def places_of(names: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """The position of each name among the known ones, of which there may be more; None if a name is missing.

    Names may differ in case, spaces, underscores and hyphens, as long as they remain distinct.
    """
    for spelt in (str, _plain):
        own, other = [spelt(name) for name in names], [spelt(name) for name in known]
        if len(set(own)) == len(own) and len(set(other)) == len(other) and set(own) <= set(other):
            return [other.index(name) for name in own]
    return None


def order_of(names: Sequence[str], head: Sequence[str]) -> list[int] | None:
    """The position in a head of each class of a data set: by name, or by number if either side has placeholders.

    None if both have names and the names differ.
    """
    found = places_of(names, head) if len(names) == len(head) else None
    if found is None and (are_placeholders(names) or are_placeholders(head)):
        return list(range(len(names)))
    return found


def names_of(config: Any, where: str | None = None) -> tuple[str, ...]:
    """The classes of a Hugging Face configuration, in the order of their numbers; perhaps placeholders.

    Args:
        where: file of the configuration, for messages; if None, `id2label` wins over a `label2id` that differs

    Raises:
        InputError: `id2label` and `label2id` contradict each other.
    """
    by_number: Mapping[Any, Any] = getattr(config, "id2label", None) or {}
    names = tuple(str(by_number[number]) for number in sorted(by_number, key=int))
    by_name: Mapping[Any, Any] = getattr(config, "label2id", None) or {}
    numbers = {int(number): str(name) for name, number in by_name.items() if str(number).isdigit()}
    if len(numbers) != len(names) or set(numbers) != set(range(len(names))):
        return names
    others = tuple(numbers[number] for number in range(len(names)))
    if are_placeholders(names):
        return others
    if where is not None and not are_placeholders(others) and order_of(others, names) != list(range(len(names))):
        found = f"found id2label with the classes {listed(names)} and label2id with {listed(others)}"
        raise InputError(found, "one order in both", where=where)
    return names


def other_classes(names: Sequence[str], head: HeadClasses, where: str) -> InputError:
    """The error for classes of a data set or model that differ from those of a trained head."""
    expected = f"those of {head.where}: {listed(head.names)}"
    return InputError(f"found the classes {listed(names)}", expected, where=where)
