"""Checks of a configuration that need neither data nor weights, before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from irdscale.config.schema import RunConfig

# What a verb reads: the data and the model, the model alone, or neither.
Reads = Literal["data", "model", "nothing"]


def check_early(config: RunConfig, reads: Reads) -> None:
    """Check the places of data and model, and what the kind of task needs, as loading them would.

    Raises:
        InputError: a place does not exist here and cannot be on the hub; `task.kind` or `task.columns` is missing; or
            other keys do not fit the kind of a GLUE task.
    """
    from irdscale.models.places import resolve_model_path
    from irdscale.tasks.sources import errors_of_mixed_with, find_source, mixed_source

    if reads == "nothing":
        return
    # A plan needs the kind of task, and no data.
    if reads == "data" or (config.task.kind is None and not _is_missing_file(config.task.dataset)):
        source = find_source(config.task)
        pool = config.task.pool
        if reads == "data" and pool is not None and pool.mixed_with is not None:
            with errors_of_mixed_with():
                mixed_source(config.task, pool.mixed_with, source.kind)
    resolve_model_path(config.model.path)


def _is_missing_file(dataset: str) -> bool:
    """Whether a data set can only be a local file or folder, which does not exist."""
    path = Path(dataset).expanduser()
    return not path.exists() and (path.is_absolute() or path.suffix != "" or dataset.startswith("."))
