"""The rows of a task's splits: GLUE tasks, hub data sets, and local parquet, JSONL, JSON and CSV files.

Columns are read into memory; nothing is written next to the user's files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from irdscale.config.task import ColumnsConfig
from irdscale.errors import InputError
from irdscale.tasks.class_names import declared_names
from irdscale.tasks.local_files import read_local
from irdscale.tasks.sources import Source, published_splits
from irdscale.utils.hub import hub_access, one_line
from irdscale.utils.suggestions import nearest


@dataclass(frozen=True)
class Rows:
    """The columns of one split. `where` is its file or data set, for messages."""

    where: str
    table: pa.Table

    def column(self, name: str, key: str) -> pa.ChunkedArray:
        """A column that `task.columns.KEY` names.

        Raises:
            InputError: no column has this name, or several have it.
        """
        key, names = f"task.columns.{key}", self.table.column_names
        if name not in names:
            near = nearest(name, names)
            raise InputError(f"found no column {name!r}{near}", f"one of {', '.join(names)}", key, self.where)
        if names.count(name) > 1:
            raise InputError(f"found {names.count(name)} columns {name!r}", "one", key, self.where)
        return self.table.column(name)

    def texts(self, name: str, key: str) -> list[str]:
        """A column of texts, one in every row.

        Raises:
            InputError: it holds something else, or a row is empty.
        """
        column, where, key = self.column(name, key), f"{self.where}: column {name!r}", f"task.columns.{key}"
        kind = column.type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise InputError(f"found {column.type}", "text", key, where)
        values: list[str] = column.to_pylist()
        if column.null_count:
            row = values.index(None)  # type: ignore[arg-type]
            raise InputError("found no text", "one in every row", key, f"{where}, row {row}")
        return values


@dataclass(frozen=True)
class Split:
    """The texts and labels of one split as Python values. `where` is its file or data set, for messages."""

    where: str
    texts: list[list[str]]
    labels: list[Any] | None
    label_names: list[str] | None


def read_rows(source: Source) -> dict[str, Rows]:
    """The rows of the splits `train` and, where they exist, `validation` and `test`.

    Raises:
        InputError: a file cannot be read, or a split is empty.
    """
    tables = _read_hub(source) if source.path is None else read_local(source.path, source)
    for name, (where, table) in tables.items():
        if table.num_rows == 0:
            raise InputError(f"the split {name} is empty", "at least one row", "task.dataset", where)
    return {name: Rows(where, table) for name, (where, table) in tables.items()}


def read_splits(source: Source) -> dict[str, Split]:
    """The texts and labels of the splits `train` and, where they exist, `validation` and `test`.

    Raises:
        InputError: as `read_rows`, or a column is missing or of the wrong type, or a text is missing.
    """
    return {name: _labelled(name, rows, source.columns) for name, rows in read_rows(source).items()}


def _read_hub(source: Source) -> dict[str, tuple[str, pa.Table]]:
    import datasets

    assert source.hub is not None
    identifier, subset = source.hub
    where = identifier if subset is None else f"{identifier} ({subset})"
    try:
        with hub_access():
            loaded = datasets.load_dataset(identifier, subset)
    except Exception as error:  # the hub's, the network's and the data builders' errors have no common class
        key = "task.subset" if "onfig" in one_line(error) else "task.dataset"
        fault = f"no such file or folder here, and not loaded from the hub: {one_line(error)}"
        raise InputError(fault, key=key, where=where) from error
    tables = {}
    for split, published in published_splits(list(loaded), source.glue, where).items():
        data = loaded[published]
        read = {name for names in source.columns.named().values() for name in names}
        # A name with a dot names a field of a column.
        read |= {name.rpartition(".")[0] for name in read}
        rows = data.with_format("arrow", columns=[name for name in data.column_names if name in read])[:]
        # Messages list all columns, but only the used ones are read.
        columns = {name: rows.column(name) if name in read else pa.nulls(len(data)) for name in data.column_names}
        table = pa.table(columns)
        table = table.replace_schema_metadata(data.features.arrow_schema.metadata)
        tables[split] = f"{where}, split {published}", table
    return tables


def _labelled(split: str, rows: Rows, columns: ColumnsConfig) -> Split:
    assert columns.text is not None
    assert columns.label is not None
    texts = [rows.texts(name, "text") for name in columns.text]
    if split == "test" and columns.label not in rows.table.column_names:
        return Split(rows.where, texts, None, None)
    labels = rows.column(columns.label, "label").to_pylist()
    return Split(rows.where, texts, labels, declared_names(rows.table, columns.label))
