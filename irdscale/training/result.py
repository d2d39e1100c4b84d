"""Parts that the results of all verbs share: the task, and versions."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from irdscale import __version__

if TYPE_CHECKING:
    from irdscale.tasks import Task


def task_facts(task: Task) -> dict[str, Any]:
    """A task as results describe it."""
    return {
        "name": task.name,
        "kind": task.kind,
        "metric": task.metric,
        "lower_is_better": task.lower_is_better,
        "num_labels": task.num_labels,
        "train": len(task.train),
        "selection": len(task.selection),
        "test": len(task.test),
        "origin": task.origin,
        "pool": task.pool_in_words,
    }


def versions() -> dict[str, str]:
    """Package -> version, of those on which numbers depend."""
    return {"irdscale": __version__, **{name: version(name) for name in ("torch", "transformers")}}
