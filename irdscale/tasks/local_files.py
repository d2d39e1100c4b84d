"""Read local parquet, JSONL, JSON and CSV files: one for each split, or its numbered shards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from irdscale.errors import InputError
from irdscale.tasks.class_names import in_one_order
from irdscale.tasks.delimiters import CSV_TYPES, delimiter_of, refuse_other_delimiter
from irdscale.tasks.sources import FILE_TYPES, VALIDATION_NAMES, Source, published_splits
from irdscale.utils.hub import one_line

_KEY = "task.dataset"
_TYPES = ", ".join(FILE_TYPES)
# What CSV files write where a row has no label, if all others are integers.
_NO_LABEL = ("", "#N/A", "#NA", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "none", "<NA>")
_PLAIN_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
SPLITS = ("train", *VALIDATION_NAMES, "test")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


def read_local(path: Path, source: Source) -> dict[str, tuple[str, pa.Table]]:
    """Split -> its file or folder, and its rows.

    Raises:
        InputError: files are missing, cannot be read, or do not fit each other.
    """
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise InputError(f"found file type {path.suffix!r}", f"one of {_TYPES}", _KEY, str(path))
        (table,) = _labels_by_type([(path, _read_file(path, source))], source)
        return {"train": (str(path), table)}
    files = sorted(child for child in path.iterdir() if _is_data(child))
    if not files:
        there = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
        raise InputError(f"found {there}", f"train.parquet (or {_TYPES})", _KEY, str(path))
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_SHARD.sub("", file.stem), []).append(file)
    unknown = [name for name in by_split if name not in SPLITS]
    if unknown and source.glue is None:
        there = ", ".join(file.name for file in by_split[unknown[0]])
        raise InputError(f"found {there}", "only files named train, validation and test", _KEY, str(path))
    tables = {}
    published_as = published_splits(list(by_split), source.glue, str(path))
    for published in published_as.values():
        _check_shards(by_split[published], published)
    files = [file for published in published_as.values() for file in by_split[published]]
    read = dict(zip(files, _labels_by_type([(file, _read_file(file, source)) for file in files], source)))
    for split, published in published_as.items():
        shards = by_split[published]
        where = str(shards[0] if len(shards) == 1 else path / published)
        try:
            tables[split] = where, pa.concat_tables(in_one_order([read[file] for file in shards], source.columns.label))
        except pa.ArrowInvalid as error:
            raise InputError(f"the files differ in their columns: {one_line(error)}", key=_KEY, where=where) from None
    return tables


def _is_data(path: Path) -> bool:
    """Whether a file in a folder holds a split; other JSON files than splits describe the data set."""
    named = path.suffix != ".json" or _SHARD.sub("", path.stem) in SPLITS
    return named and path.suffix in FILE_TYPES and path.is_file()


def _check_shards(files: list[Path], split: str) -> None:
    """Check that a split has one file, or every one of its numbered shards."""
    if len(files) == 1 and not _SHARD.search(files[0].stem):
        return
    matches = [_SHARD.search(file.stem) for file in files]
    if any(match is None for match in matches) or len({file.suffix for file in files}) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"found {names}", f"one file for the split {split}", _KEY, str(files[0].parent))
    total = int(matches[0][2])  # type: ignore[index]
    if len(files) != total:
        fault = f"found {len(files)} of the {total} files of the split {split}"
        raise InputError(fault, "all of them", _KEY, str(files[0].parent))


def _read_file(path: Path, source: Source) -> pa.Table:
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        if path.suffix in (".jsonl", ".json"):
            return _read_jsonl(path) if path.suffix == ".jsonl" else _read_json(path)
        return _read_csv(path, source)
    except pa.ArrowInvalid as error:
        if path.stat().st_size == 0 or "Empty CSV" in str(error):
            raise InputError("the file is empty", key=_KEY, where=path) from None
        raise InputError(f"not a {path.suffix[1:]} file: {one_line(error)}", key=_KEY, where=path) from None
    except OSError as error:
        fault = f"cannot be read: {error.strerror or one_line(error)}"
        raise InputError(fault, key=_KEY, where=path) from None


def _read_csv(path: Path, source: Source) -> pa.Table:
    import pyarrow.csv

    used = delimiter_of(path, source.delimiter)
    needed = [name for names in source.columns.named().values() for name in names]
    try:
        table = pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(delimiter=used, newlines_in_values=True),
            # Without this, texts that are all digits would become numbers.
            convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in _of_text(source)}),
        )
    except pa.ArrowInvalid:
        refuse_other_delimiter(path, used, [], needed)
        raise
    refuse_other_delimiter(path, used, table.column_names, needed)
    return table


def _of_text(source: Source) -> list[str]:
    """The columns to read as text: all but the labels of a regression."""
    keys = source.columns.named().items()
    return [name for key, names in keys if key != "label" or source.kind != "regression" for name in names]


def _labels_by_type(files: list[tuple[Path, pa.Table]], source: Source) -> list[pa.Table]:
    """The files' tables; labels of CSV files become integers if they are plain integers in all such files."""
    label = source.columns.label
    chosen = [
        number
        for number, (path, table) in enumerate(files)
        if path.suffix in CSV_TYPES and label in _of_text(source) and table.column_names.count(label) == 1
    ]
    tables = [table for _, table in files]
    if not chosen:
        return tables
    columns = [pc.utf8_trim_whitespace(tables[number].column(label)) for number in chosen]
    missing = [pc.is_in(column, value_set=pa.array(_NO_LABEL)) for column in columns]
    plain = [pc.match_substring_regex(column, _PLAIN_INTEGER) for column in columns]
    integers = all(pc.all(pc.or_(*both)).as_py() for both in zip(plain, missing, strict=True))
    for number, column, none in zip(chosen, columns, missing, strict=True):
        if integers:
            column = pc.if_else(none, pa.scalar(None, pa.string()), column).cast(pa.int64())
        elif pc.all(none).as_py():
            column = pa.chunked_array([pa.nulls(len(column), pa.string())])
        else:
            continue
        tables[number] = tables[number].set_column(tables[number].column_names.index(label), label, column)
    return tables


def _read_jsonl(path: Path) -> pa.Table:
    rows: list[Any] = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"not JSON: {one_line(error)}", key=_KEY, where=f"{path}:{number}") from None
            if not isinstance(row, dict):
                raise InputError(f"found {type(row).__name__}", "a JSON object", _KEY, f"{path}:{number}")
            rows.append(row)
    return _table(rows, path)


def _read_json(path: Path) -> pa.Table:
    """The rows of a list of JSON objects; or of lines of them, which some data sets name `.json` too."""
    text = path.read_bytes()
    if not text.strip():
        raise InputError("the file is empty", key=_KEY, where=path)
    try:
        rows = json.loads(text)
    except ValueError as error:
        if text.lstrip()[:1] == b"{" and "Extra data" in str(error):
            return _read_jsonl(path)
        raise InputError(f"not JSON: {one_line(error)}", key=_KEY, where=path) from None
    if not isinstance(rows, list):
        raise InputError(f"found {type(rows).__name__}", "a list of JSON objects", _KEY, path)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"found {type(row).__name__}", "a JSON object", _KEY, f"{path}, row {number}")
    return _table(rows, path)


def _table(rows: list[dict[str, Any]], path: Path) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _json_column([row.get(name) for row in rows], name, path) for name in names})


def _json_column(values: list[Any], name: str, path: Path) -> pa.Array:
    try:
        return pa.array(values, from_pandas=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        fault = f"found values of types {', '.join(kinds)}"
        raise InputError(fault, "one type", _KEY, f"{path}: column {name!r}") from error
