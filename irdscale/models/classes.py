"""Class names: whether they say anything, and which of a trained head's classes each class of a data set is."""

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
    """What a trained head tells apart.

    Attributes:
        where: whose head it is, for messages.
        kind: the kind of task, such as `sequence-classification` or `regression`; None where nothing says it.
        names: the classes in the order of the head's outputs; none of a head without classes.
        counted: the same classes in the order in which metrics count them, where that is the head's own affair.
    """

    where: str
    kind: str | None
    names: tuple[str, ...]
    counted: tuple[str, ...] = ()


def listed(values: Sequence[Any]) -> str:
    """The values for a message, the first few of many."""
    text = ", ".join(str(value) for value in values[:SHOWN])
    return text if len(values) <= SHOWN else f"{text}, ... ({len(values)} in all)"


def _plain(name: str) -> str:
    """A class name without what spelling changes: case, spaces, and the word of `LABEL_0`."""
    name = _SPACES.sub(" ", str(name).strip().casefold())
    return _NUMBERED.sub("", name)


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether names say no more than numbers do, such as `LABEL_0`, `LABEL_1`, or `0`, `1`."""
    return all(_plain(name) == str(number) for number, name in enumerate(names))


def places_of(names: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """The place of each name among the known ones, which may be more; None where one is not there.

    Spelling may differ in case, and in spaces, underscores and hyphens, where that leaves all names distinct.
    """
    for spelt in (str, _plain):
        own, other = [spelt(name) for name in names], [spelt(name) for name in known]
        if len(set(own)) == len(own) and len(set(other)) == len(other) and set(own) <= set(other):
            return [other.index(name) for name in own]
    return None


def order_of(names: Sequence[str], head: Sequence[str]) -> list[int] | None:
    """Which of a head's classes each class of a data set is: by name, or by number where either side has none.

    None where both are named, and not alike.
    """
    found = places_of(names, head) if len(names) == len(head) else None
    if found is None and (are_placeholders(names) or are_placeholders(head)):
        return list(range(len(names)))
    return found


def names_of(config: Any, where: str | None = None) -> tuple[str, ...]:
    """The classes of a Hugging Face configuration, in the order of their numbers; placeholders where it has no names.

    Args:
        where: the file that it came from, for messages; unless given, `id2label` counts where the two differ.

    Raises:
        InputError: its `id2label` and its `label2id` contradict each other.
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
        raise InputError(
            f"{where}: found id2label with the classes {listed(names)} and label2id with {listed(others)}; "
            f"expected one order in both"
        )
    return names


def other_classes(names: Sequence[str], head: HeadClasses, where: str) -> InputError:
    """An error that says that the classes of a data set, or of a model, are not those of a trained head."""
    return InputError(
        f"{where}: found the classes {listed(names)}; expected those of {head.where}: {listed(head.names)}"
    )
