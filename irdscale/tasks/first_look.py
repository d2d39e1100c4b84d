"""Look at a local data set for a first configuration: its rows, its delimiter, and the use that suits them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import yaml

from irdscale.config.kinds import COLUMNS, Kind
from irdscale.config.task import ColumnsConfig, TaskConfig
from irdscale.errors import InputError
from irdscale.tasks.column_profiles import columns_of
from irdscale.tasks.delimiters import CSV_TYPES, delimiter_of, found_delimiter
from irdscale.tasks.local_files import read_local
from irdscale.tasks.proposals import Proposal, label_kinds, names_of, propose
from irdscale.tasks.sources import FILE_TYPES, Source, find_source
from irdscale.utils.suggestions import nearest

# Most uses that an error lists.
LISTED = 6


@dataclass(frozen=True)
class Look:
    """What a data set holds, and its chosen use.

    Attributes:
        dataset: value for `task.dataset`.
        rows: rows of the split train.
        splits: names of the splits.
        table: rows of the split train; None for a GLUE task on the hub.
        delimiter: delimiter of its CSV files, if it is not that of their type.
        chosen: kind and columns.
        passed: other uses of the same data, which were not chosen.
    """

    dataset: str
    rows: int | None
    splits: tuple[str, ...]
    table: pa.Table | None
    delimiter: str | None
    chosen: Proposal
    passed: list[Proposal]


def look(data: str, kind: str | None, given: dict[str, Any]) -> Look:
    """Read a data set and choose its use.

    Args:
        data: file, folder, or glue/NAME.
        kind: kind of task that the user wants; None to choose it.
        given: values of `task` that the user gives, such as {"columns": {"label": "stars"}, "delimiter": ";"}.

    Raises:
        InputError: there are no such data; they cannot be read; nothing in them suits the kind or the columns; or two
            uses are as likely, which are listed with the option that decides.
    """
    path, glue = Path(data).expanduser(), None
    if path.exists() or data.startswith("glue/"):
        glue = _glue(data)
    if glue is not None:
        if kind not in (None, glue.kind):
            raise InputError(f"found {kind!r}", f"{glue.kind!r}, the kind of {glue.name}", "--task")
        place = str(path.resolve()) if path.exists() else data
        return Look(place, None, (), None, None, Proposal(None, {}, glue.name.removeprefix("glue/")), [])
    if not path.exists():
        raise InputError(
            "no such file or folder", f"a local one ({', '.join(FILE_TYPES)}), or glue/NAME", "--data", data
        )
    delimiter = given.get("delimiter") or _delimiter(path)
    source = Source(path.stem, "causal-lm", ColumnsConfig(), None, path.resolve(), None, delimiter)
    read = read_local(source.path or path, source)
    if "train" not in read or read["train"][1].num_rows == 0:
        raise InputError("found no rows to train on", "some", "--data", path)
    table = read["train"][1]
    chosen, passed = choose(table, kind, given.get("columns"), str(path))
    return Look(str(path.resolve()), table.num_rows, tuple(read), table, delimiter, chosen, passed)


def _glue(data: str) -> Source | None:
    """The GLUE task that a name or a folder means."""
    try:
        source = find_source(TaskConfig(dataset=data))
    except InputError as error:
        if error.key in ("task.kind", "task.columns"):
            return None
        raise InputError(error.found, error.expected, "--data", error.where) from error
    return source if source.glue is not None else None


def _delimiter(path: Path) -> str | None:
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        if file.suffix in CSV_TYPES and file.is_file():
            found = found_delimiter(file)
            return found if found not in (None, delimiter_of(file, None)) else None
    return None


def choose(
    table: pa.Table, kind: str | None, columns: dict[str, Any] | None, where: str
) -> tuple[Proposal, list[Proposal]]:
    """The likeliest use of a table's rows that has this kind and these columns, and the others.

    Raises:
        InputError: there is none, or two are as likely.
    """
    wanted = {
        key: [value] if isinstance(value, str) and key in ("text", "choices") else value
        for key, value in (columns or {}).items()
    }
    _check_names(table, wanted, where)
    uses = [each for each in propose(table) if kind is None or each.kind == kind]
    fitting = [each for each in uses if all(each.columns.get(key) == value for key, value in wanted.items())]
    complete = list(_complete(table, kind, wanted))
    # Columns that the user names in full need no other evidence.
    fitting = complete or fitting
    if not fitting:
        held = ", ".join(column.in_words() for column in columns_of(table)) or "no columns"
        for_kind = f" for {kind}" if kind is not None else ""
        sets = COLUMNS[kind] if kind is not None else ()
        example = f" ({', or '.join(' and '.join(way) for way in sets)})" if sets else ""
        raise InputError(
            f"found {held}", f"columns{for_kind}{example}: give 'task.columns={{..}}'", "task.columns", where
        )
    best = [each for each in fitting if each.rank == fitting[0].rank]
    if len(best) > 1:
        ways = [_deciding(each, best) for each in best]
        more = f", or {len(ways) - LISTED} more" if len(ways) > LISTED else ""
        raise InputError(f"found {len(ways)} likely uses", f"one of: {'; '.join(ways[:LISTED])}{more}", "task", where)
    return best[0], [each for each in uses if each != best[0]]


def _deciding(use: Proposal, best: list[Proposal]) -> str:
    """The option that chooses a use among others, and what speaks for it."""
    options = []
    if sum(each.columns == use.columns for each in best) > 1 or len({each.kind for each in best}) == len(best):
        options.append(f"--task {use.kind}")
    if sum(each.kind == use.kind for each in best) > 1:
        options.append(f"'task.columns={as_flow(use.columns)}'")
    options = options or [f"'task.columns={as_flow(use.columns)}'"]
    return f"{' '.join(options)} ({use.why})"


def as_flow(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True).strip()


def _check_names(table: pa.Table, columns: dict[str, Any], where: str) -> None:
    for key, value in columns.items():
        if key not in ColumnsConfig.model_fields:
            fault = f"unknown key{nearest(key, ColumnsConfig.model_fields)}"
            raise InputError(fault, f"one of {', '.join(ColumnsConfig.model_fields)}", f"task.columns.{key}")
        for name in value if isinstance(value, list) else [value]:
            if str(name).partition(".")[0] not in table.column_names and name not in table.column_names:
                near = nearest(name, table.column_names)
                expected = f"one of {', '.join(table.column_names)}"
                raise InputError(f"found no column {name!r}{near}", expected, f"task.columns.{key}", where)


def _complete(table: pa.Table, kind: str | None, wanted: dict[str, Any]) -> Iterator[Proposal]:
    """Uses by columns that the user names in full."""
    columns = {column.name: column for column in columns_of(table)}
    kinds: tuple[Kind, ...] = get_args(Kind)
    for each in kinds:
        if kind not in (None, each) or set(wanted) not in [set(way) for way in COLUMNS[each]]:
            continue
        why = "as given"
        if kind is None and "text" in wanted and "label" in wanted and wanted["label"] in columns:
            said = dict(label_kinds(columns[wanted["label"]]))
            if each not in said:
                continue
            why = said[each]
        yield Proposal(each, wanted, why)


def left_out(found: Look) -> list[str]:
    """Columns that the chosen use does not read."""
    used = {name.partition(".")[0] for name in names_of(found.chosen)}
    return [] if found.table is None else [name for name in found.table.column_names if name not in used]
