"""Which files, or which data set of the hub, `task.dataset` means. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from irdscale.config.kinds import COLUMNS, METRICS, Kind
from irdscale.config.task import ColumnsConfig, MixedWithConfig, TaskConfig, check_columns, check_kind
from irdscale.errors import InputError
from irdscale.tasks.glue import GLUE, HUB_ID, GlueTask, glue_task
from irdscale.utils.hub import is_hub_id
from irdscale.utils.suggestions import nearest

FILE_TYPES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
# The names under which data sets publish their validation split.
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_OWN = "(only GLUE tasks have their own)"


@dataclass(frozen=True)
class Source:
    """Where a task's rows come from: a local path, or a hub data set and its configuration.

    `delimiter` stands between the columns of CSV files; None if it follows from the file's type.
    """

    name: str
    kind: Kind
    columns: ColumnsConfig
    glue: GlueTask | None
    path: Path | None
    hub: tuple[str, str | None] | None
    delimiter: str | None = None


def find_source(task: TaskConfig) -> Source:
    """Decide what `task.dataset` is: a local path if there is one, else `glue/NAME`, else a hub id. Reads no data.

    Raises:
        InputError: nothing has that name, or `kind`, `columns` or `subset` are missing or contradict it.
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
            raise InputError(f"found {task.subset!r}", f"none beside {task.dataset}", "task.subset")
        name, hub = task.dataset, (HUB_ID, glue.name)
    elif path.suffix in FILE_TYPES or not is_hub_id(task.dataset):
        raise InputError(f"{task.dataset}: no such file or folder", key="task.dataset")
    else:
        hub = (task.dataset, task.subset)
        name = task.dataset if task.subset is None else f"{task.dataset}/{task.subset}"
    local = None if hub else path
    if glue is not None:
        if task.kind not in (None, glue.kind):
            raise InputError(f"found {task.kind!r}", f"{glue.kind!r} for glue/{glue.name}", "task.kind")
        columns = task.columns or ColumnsConfig(text=list(glue.text), label=glue.label)
        check_columns(glue.kind, columns, "task.columns")
        check_kind(task, glue.kind, "task.")
        return Source(name, glue.kind, columns, glue, local, hub, task.delimiter)
    if task.kind is None:
        raise InputError("missing", f"one of {', '.join(METRICS)} {_OWN}", "task.kind")
    if task.columns is None:
        ways = ", or ".join("{" + ", ".join(f"{key}: .." for key in way) + "}" for way in COLUMNS[task.kind])
        raise InputError("missing", f"{ways} {_OWN}", "task.columns")
    return Source(name, task.kind, task.columns, None, local, hub, task.delimiter)


def mixed_source(task: TaskConfig, mixed: MixedWithConfig, kind: Kind) -> Source:
    """Decide what `task.pool.mixed_with.dataset` is, as `find_source` does for `task.dataset`.

    Args:
        kind: kind of the task's samples.

    Raises:
        InputError: as `find_source`, with the keys of `task`; see `errors_of_mixed_with`.
    """
    own = {"dataset": mixed.dataset, "subset": mixed.subset, "delimiter": mixed.delimiter, "kind": kind, "pool": None}
    task = task.model_copy(update={**own, "columns": mixed.columns or task.columns})
    source = find_source(task)
    if source.glue is not None and mixed.columns is None:
        # GLUE tasks have columns of their own.
        source = find_source(task.model_copy(update={"columns": None}))
    return source


@contextmanager
def errors_of_mixed_with() -> Iterator[None]:
    """Give errors of the second data set the keys of `task.pool.mixed_with`."""
    try:
        yield
    except InputError as error:
        section, _, key = error.key.partition(".")
        if section == "task" and key.partition(".")[0] in MixedWithConfig.model_fields:
            raise InputError(error.found, error.expected, f"task.pool.mixed_with.{key}", error.where) from error
        raise InputError(str(error), key="task.pool.mixed_with") from error


def _with_subset(path: Path, subset: str | None) -> Path:
    if subset is None:
        return path
    if path.is_file():
        raise InputError(f"found {subset!r}", f"none beside a file ({path})", "task.subset")
    if not (path / subset).is_dir():
        folders = sorted(child.name for child in path.iterdir() if child.is_dir())
        expected = f"a folder in {path}: {', '.join(folders) or 'there is none'}"
        raise InputError(f"found {subset!r}{nearest(subset, folders)}", expected, "task.subset")
    return path / subset


def published_splits(found: list[str], glue: GlueTask | None, where: str) -> dict[str, str]:
    """Which of the published splits are train, validation and test: {our name: the published name}.

    Raises:
        InputError: there is no split train, or there are two validation splits.
    """
    names = {"train": "train", "test": "test"}
    validations = [glue.validation] if glue else [name for name in found if name in VALIDATION_NAMES]
    if len(validations) > 1:
        raise InputError(f"found both {validations[0]} and {validations[1]}", "one of them", "task.dataset", where)
    if validations:
        names["validation"] = validations[0]
    if "train" not in found:
        raise InputError(f"found the splits {', '.join(sorted(found))}", "a split train", "task.dataset", where)
    return {ours: names[ours] for ours in ("train", "validation", "test") if names.get(ours) in found}
