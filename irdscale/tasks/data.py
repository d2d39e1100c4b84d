"""Reading a task's rows: GLUE tasks, hub data sets, and local parquet, JSONL and CSV files.

Columns are read into memory; nothing is written next to the user's files.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from irdscale.config.kinds import COLUMNS, METRICS, Kind
from irdscale.config.task import ColumnsConfig, TaskConfig, check_columns, check_pool
from irdscale.errors import InputError
from irdscale.models.classes import are_placeholders, places_of
from irdscale.tasks.glue import GLUE, HUB_ID, GlueTask, glue_task
from irdscale.utils.hub import hub_access, is_hub_id, one_line
from irdscale.utils.suggestions import nearest

FILE_TYPES = (".parquet", ".jsonl", ".csv")
# The names under which data sets publish their validation split.
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
# What CSV files write where a row has no label, if all others are integers.
_NO_LABEL = ("", "#N/A", "#NA", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "none", "<NA>")
_PLAIN_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True)
class Source:
    """Where a task's rows come from: a local path, or a hub data set and its configuration."""

    name: str
    kind: Kind
    columns: ColumnsConfig
    glue: GlueTask | None
    path: Path | None
    hub: tuple[str, str | None] | None


@dataclass(frozen=True)
class Rows:
    """One split's columns. `where` names its file or data set, for messages."""

    where: str
    table: pa.Table

    def column(self, name: str, key: str) -> pa.ChunkedArray:
        """A column that `task.columns.KEY` names.

        Raises:
            InputError: there is none of this name, or several.
        """
        names = self.table.column_names
        if name not in names:
            raise InputError(
                f"task.columns.{key}: {self.where}: found no column {name!r}{nearest(name, names)}; "
                f"there are: {', '.join(names)}"
            )
        if names.count(name) > 1:
            raise InputError(
                f"task.columns.{key}: {self.where}: found {names.count(name)} columns {name!r}; expected one"
            )
        return self.table.column(name)

    def texts(self, name: str, key: str) -> list[str]:
        """A column of texts, one in every row.

        Raises:
            InputError: it holds something else, or a row holds nothing.
        """
        column, where = self.column(name, key), f"task.columns.{key}: {self.where}: column {name!r}"
        kind = column.type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise InputError(f"{where}: found {column.type}; expected text")
        values: list[str] = column.to_pylist()
        if column.null_count:
            raise InputError(f"{where}, row {values.index(None)}: found no text; expected one in every row")  # type: ignore[arg-type]
        return values

    def class_names(self, name: str) -> list[str] | None:
        """What a column's class numbers are called, where the data set says so."""
        return _declared_names(self.table, name)


@dataclass(frozen=True)
class Split:
    """One split's texts and labels as Python values. `where` names its file or data set, for messages."""

    where: str
    texts: list[list[str]]
    labels: list[Any] | None
    label_names: list[str] | None


def find_source(task: TaskConfig) -> Source:
    """Decide what `task.dataset` is: a local path if there is one, else `glue/NAME`, else a hub id. Reads no data.

    Raises:
        InputError: nothing of that name, or `kind`, `columns` or `subset` missing or at odds with it.
    """
    path = Path(task.dataset).expanduser()
    glue: GlueTask | None = None
    hub: tuple[str, str | None] | None = None
    if path.exists():
        path = _with_subset(path, task.subset).resolve()
        if path.is_dir() and path.parts[-2:-1] == ("glue",) and path.name in GLUE:
            glue = glue_task(path.name)
        name = f"glue/{glue.name}" if glue else path.stem if path.is_file() else path.name
    elif task.dataset.startswith("glue/"):
        glue = glue_task(task.dataset.removeprefix("glue/"))
        if task.subset is not None:
            raise InputError(f"task.subset: found {task.subset!r}; expected none beside {task.dataset}")
        name, hub = task.dataset, (HUB_ID, glue.name)
    elif path.suffix in FILE_TYPES or not is_hub_id(task.dataset):
        raise InputError(f"task.dataset: {task.dataset}: no such file or folder")
    else:
        hub = (task.dataset, task.subset)
        name = task.dataset if task.subset is None else f"{task.dataset}/{task.subset}"
    local = None if hub else path
    if glue is not None:
        if task.kind not in (None, glue.kind):
            raise InputError(f"task.kind: found {task.kind!r}; expected {glue.kind!r} for glue/{glue.name}")
        columns = task.columns or ColumnsConfig(text=list(glue.text), label=glue.label)
        check_columns(glue.kind, columns, "task.columns")
        if task.pool is not None:
            check_pool(glue.kind, task.pool, "task.pool")
        return Source(name, glue.kind, columns, glue, local, hub)
    if task.kind is None:
        raise InputError(f"task.kind: missing; expected one of {', '.join(METRICS)} (only GLUE tasks have their own)")
    if task.columns is None:
        ways = ", or ".join("{" + ", ".join(f"{key}: .." for key in way) + "}" for way in COLUMNS[task.kind])
        raise InputError(f"task.columns: missing; expected {ways} (only GLUE tasks have their own)")
    return Source(name, task.kind, task.columns, None, local, hub)


def _with_subset(path: Path, subset: str | None) -> Path:
    if subset is None:
        return path
    if path.is_file():
        raise InputError(f"task.subset: found {subset!r}; expected none beside a file ({path})")
    if not (path / subset).is_dir():
        folders = sorted(child.name for child in path.iterdir() if child.is_dir())
        there = f"expected a folder in {path}: {', '.join(folders) or 'there is none'}"
        raise InputError(f"task.subset: found {subset!r}{nearest(subset, folders)}; {there}")
    return path / subset


def read_rows(source: Source) -> dict[str, Rows]:
    """The rows of the splits `train` and, where they exist, `validation` and `test`.

    Raises:
        InputError: a file cannot be read, or a split is empty.
    """
    tables = _read_hub(source) if source.path is None else _read_local(source)
    for name, (where, table) in tables.items():
        if table.num_rows == 0:
            raise InputError(f"task.dataset: {where}: the split {name} is empty; expected at least one row")
    return {name: Rows(where, table) for name, (where, table) in tables.items()}


def read_splits(source: Source) -> dict[str, Split]:
    """The texts and labels of the splits `train` and, where they exist, `validation` and `test`.

    Raises:
        InputError: as `read_rows`, or a column is missing or of the wrong type, or a text is missing.
    """
    return {name: _labelled(name, rows, source.columns) for name, rows in read_rows(source).items()}


def _read_local(source: Source) -> dict[str, tuple[str, pa.Table]]:
    path = source.path
    assert path is not None
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise InputError(f"task.dataset: {path}: found file type {path.suffix!r}; expected one of {_types()}")
        (table,) = _labels_by_type([(path, _read_file(path, source))], source)
        return {"train": (str(path), table)}
    files = sorted(child for child in path.iterdir() if child.suffix in FILE_TYPES and child.is_file())
    if not files:
        there = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
        raise InputError(f"task.dataset: {path}: found {there}; expected train.parquet (or {_types()})")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_SHARD.sub("", file.stem), []).append(file)
    unknown = [name for name in by_split if name not in ("train", *VALIDATION_NAMES, "test")]
    if unknown and source.glue is None:
        there = ", ".join(file.name for file in by_split[unknown[0]])
        raise InputError(f"task.dataset: {path}: found {there}; expected only files named train, validation and test")
    tables = {}
    published_as = _names(list(by_split), source.glue, str(path))
    for published in published_as.values():
        _check_shards(by_split[published], published)
    files = [file for published in published_as.values() for file in by_split[published]]
    read = dict(zip(files, _labels_by_type([(file, _read_file(file, source)) for file in files], source)))
    for split, published in published_as.items():
        shards = by_split[published]
        where = str(shards[0] if len(shards) == 1 else path / published)
        try:
            tables[split] = where, pa.concat_tables(_in_one_order([read[file] for file in shards], source))
        except pa.ArrowInvalid as error:
            raise InputError(f"task.dataset: {where}: the files differ in their columns: {one_line(error)}") from None
    return tables


def _types() -> str:
    return ", ".join(FILE_TYPES)


def _names(found: list[str], glue: GlueTask | None, where: str) -> dict[str, str]:
    """Which of the published splits are train, validation and test: {our name: the published name}."""
    names = {"train": "train", "test": "test"}
    validations = [glue.validation] if glue else [name for name in found if name in VALIDATION_NAMES]
    if len(validations) > 1:
        raise InputError(
            f"task.dataset: {where}: found both {validations[0]} and {validations[1]}; expected one of them"
        )
    if validations:
        names["validation"] = validations[0]
    if "train" not in found:
        raise InputError(f"task.dataset: {where}: found no split train; there are: {', '.join(sorted(found))}")
    return {ours: names[ours] for ours in ("train", "validation", "test") if names.get(ours) in found}


def _check_shards(files: list[Path], split: str) -> None:
    """One file for each split, or every one of its numbered shards."""
    if len(files) == 1 and not _SHARD.search(files[0].stem):
        return
    matches = [_SHARD.search(file.stem) for file in files]
    if any(match is None for match in matches) or len({file.suffix for file in files}) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"task.dataset: {files[0].parent}: found {names}; expected one file for the split {split}")
    total = int(matches[0][2])  # type: ignore[index]
    if len(files) != total:
        raise InputError(
            f"task.dataset: {files[0].parent}: found {len(files)} of the {total} files of the split {split}"
        )


def _read_file(path: Path, source: Source) -> pa.Table:
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        if path.suffix == ".jsonl":
            return _read_jsonl(path)
        return pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            # Without this, texts that are all digits would become numbers.
            convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in _of_text(source)}),
        )
    except pa.ArrowInvalid as error:
        if path.stat().st_size == 0 or "Empty CSV" in str(error):
            raise InputError(f"task.dataset: {path}: the file is empty") from None
        raise InputError(f"task.dataset: {path}: not a {path.suffix[1:]} file: {one_line(error)}") from None
    except OSError as error:
        raise InputError(f"task.dataset: {path}: cannot be read: {error.strerror or one_line(error)}") from None


def _of_text(source: Source) -> list[str]:
    """The columns that are read as text: all but the numbers of a regression."""
    keys = source.columns.named().items()
    return [name for key, names in keys if key != "label" or source.kind != "regression" for name in names]


def _labels_by_type(files: list[tuple[Path, pa.Table]], source: Source) -> list[pa.Table]:
    """The files' tables; labels of CSV files become integers where those of all such files are plain ones."""
    label = source.columns.label
    mine = [
        place
        for place, (path, table) in enumerate(files)
        if path.suffix == ".csv" and label in _of_text(source) and table.column_names.count(label) == 1
    ]
    tables = [table for _, table in files]
    if not mine:
        return tables
    columns = [pc.utf8_trim_whitespace(tables[place].column(label)) for place in mine]
    missing = [pc.is_in(column, value_set=pa.array(_NO_LABEL)) for column in columns]
    plain = [pc.match_substring_regex(column, _PLAIN_INTEGER) for column in columns]
    integers = all(pc.all(pc.or_(*both)).as_py() for both in zip(plain, missing, strict=True))
    for place, column, none in zip(mine, columns, missing, strict=True):
        if integers:
            column = pc.if_else(none, pa.scalar(None, pa.string()), column).cast(pa.int64())
        elif pc.all(none).as_py():
            column = pa.chunked_array([pa.nulls(len(column), pa.string())])
        else:
            continue
        tables[place] = tables[place].set_column(tables[place].column_names.index(label), label, column)
    return tables


def _in_one_order(shards: list[pa.Table], source: Source) -> list[pa.Table]:
    """The shards of a split, with class numbers that mean the same names in all of them."""
    label = source.columns.label
    if label is None or len(shards) == 1:
        return shards
    named = [_declared_names(shard, label) for shard in shards]
    if all(names == named[0] for names in named):
        return shards
    given = [names for names in named if names]
    names = list(next((own for own in given if not are_placeholders(own)), given[0]))
    places: list[dict[int, int]] = []
    for own in named:
        places.append({})
        for number, name in enumerate(own or ()):
            found = places_of([name], names)
            if found is None and are_placeholders(own or ()):
                found = [number]
            elif found is None:
                names.append(name)
            places[-1][number] = len(names) - 1 if found is None else found[0]
    shards = [_renumbered(*each, label, len(names)) for each in zip(shards, places, strict=True)]
    return [_with_names(shards[0], label, names), *shards[1:]]


def _renumbered(table: pa.Table, places: dict[int, int], label: str, count: int) -> pa.Table:
    if not places:
        return table
    column = table.column(label)
    # What is no class stays none: no label, -1, and what lies beyond the classes.
    numbers = [
        value if value is None or value < 0 else places.get(value, count + value) for value in column.to_pylist()
    ]
    return table.set_column(table.column_names.index(label), label, pa.array(numbers, column.type))


def _with_names(table: pa.Table, label: str, names: list[str]) -> pa.Table:
    import datasets

    features = datasets.Features.from_arrow_schema(table.schema)
    features[label] = datasets.ClassLabel(names=names)
    return table.replace_schema_metadata(features.arrow_schema.metadata)


def _read_jsonl(path: Path) -> pa.Table:
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"task.dataset: {path}:{number}: not JSON: {one_line(error)}") from None
            if not isinstance(row, dict):
                raise InputError(f"task.dataset: {path}:{number}: found {type(row).__name__}; expected a JSON object")
            rows.append(row)
            names |= dict.fromkeys(row)
    return pa.table({name: _json_column([row.get(name) for row in rows], name, path) for name in names})


def _json_column(values: list[Any], name: str, path: Path) -> pa.Array:
    try:
        return pa.array(values, from_pandas=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        raise InputError(
            f"task.dataset: {path}: column {name!r}: found values of types {', '.join(kinds)}; expected one type"
        ) from error


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
        raise InputError(
            f"{key}: {where}: no such file or folder here, and not loaded from the hub: {one_line(error)}"
        ) from error
    tables = {}
    for split, published in _names(list(loaded), source.glue, where).items():
        data = loaded[published]
        read = {name for names in source.columns.named().values() for name in names}
        # A name with a dot is that of a column's field.
        read |= {name.rpartition(".")[0] for name in read}
        rows = data.with_format("arrow", columns=[name for name in data.column_names if name in read])[:]
        # Messages name every column, but only the values of those that are used are read.
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
    return Split(rows.where, texts, labels, _declared_names(rows.table, columns.label))


def _declared_names(table: pa.Table, label: str) -> list[str] | None:
    """The class names that Hugging Face data sets keep in the file's metadata."""
    import datasets

    if b"huggingface" not in (table.schema.metadata or {}):
        return None
    feature = datasets.Features.from_arrow_schema(table.schema).get(label)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
