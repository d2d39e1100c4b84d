"""What the columns of a table hold: texts, classes, numbers, chats or choices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from irdscale.tasks.class_names import declared_names

# Rows of a column that are looked at.
SAMPLED = 5000
# Most classes, most characters of a class's name on average, and fewest rows of a class on average.
MOST_CLASSES, LONGEST_NAME, ROWS_OF_CLASS = 100, 40, 3
_IDS = ("id", "idx", "index", "uuid", "guid", "url", "link", "row", "split", "file", "filename", "path")


@dataclass(frozen=True)
class Column:
    """A column of a table: its name, its type, and its first values that are not null."""

    name: str
    type: pa.DataType
    values: list[Any]
    declared: list[str] | None

    @property
    def plain(self) -> str:
        """The name in lower case."""
        return self.name.strip().lower()

    @cached_property
    def is_text(self) -> bool:
        """Whether it holds texts."""
        kind = self.type.value_type if pa.types.is_dictionary(self.type) else self.type
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

    @cached_property
    def is_id(self) -> bool:
        """Whether its name says that it identifies rows, or its values are too many for words without a space."""
        return self.plain in _IDS or self.plain.endswith(("_id", "-id"))

    @cached_property
    def distinct(self) -> int:
        """Number of different values."""
        return len({str(value) for value in self.values})

    @cached_property
    def is_prose(self) -> bool:
        """Whether it holds texts of several words, such as a model reads."""
        spaced = sum(" " in value.strip() for value in self.values) if self.is_text else 0
        return self.is_text and not self.is_id and spaced > len(self.values) / 4

    @cached_property
    def is_number(self) -> bool:
        """Whether it holds numbers or truth values."""
        kind = self.type
        return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)

    @cached_property
    def are_class_numbers(self) -> bool:
        """Whether it holds every integer from 0 to some largest class number."""
        if not self.is_number or any(value % 1 for value in self.values):
            return False
        found = {int(value) for value in self.values}
        return 2 <= len(found) <= MOST_CLASSES and min(found) == 0 and max(found) == len(found) - 1

    @cached_property
    def are_class_names(self) -> bool:
        """Whether it holds short texts, each of them in several rows."""
        if not self.is_text or not 2 <= self.distinct <= min(MOST_CLASSES, len(self.values) / ROWS_OF_CLASS):
            return False
        return all(self.values) and sum(map(len, self.values)) <= LONGEST_NAME * len(self.values)

    @cached_property
    def is_chat(self) -> bool:
        """Whether it holds lists of {role, content} or of {from, value}."""
        if not _is_list(self.type) or not pa.types.is_struct(self.type.value_type):
            return False
        names = _fields(self.type.value_type)
        return {"role", "content"} <= names or {"from", "value"} <= names

    @cached_property
    def are_choices(self) -> bool:
        """Whether it holds lists of texts, or such lists with labels of their own."""
        kind = self.type
        if pa.types.is_struct(kind):
            return "text" in _fields(kind) and _is_list(kind.field("text").type)
        if not _is_list(kind):
            return False
        inner = kind.value_type
        return pa.types.is_string(inner) or (pa.types.is_struct(inner) and "text" in _fields(inner))

    def in_words(self) -> str:
        """Name and contents, for messages."""
        if self.is_chat:
            what = "chats"
        elif self.are_choices:
            what = "lists of texts"
        elif self.declared is not None or self.are_class_names or (self.are_class_numbers and not self.is_id):
            what = f"{len(self.declared) if self.declared else self.distinct} classes"
        else:
            what = "texts" if self.is_text else "numbers" if self.is_number else str(self.type)
        return f"{self.name} ({what})"


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _fields(kind: pa.StructType) -> set[str]:
    return {kind.field(i).name for i in range(kind.num_fields)}


def columns_of(table: pa.Table) -> list[Column]:
    """The columns of a table that hold any value."""
    found = []
    for name in table.column_names:
        if table.column_names.count(name) == 1:
            values = table.column(name)[:SAMPLED].drop_null().to_pylist()
            if values:
                found.append(Column(name, table.column(name).type, values, declared_names(table, name)))
    return found
