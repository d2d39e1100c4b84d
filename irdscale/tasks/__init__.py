"""Tasks: the data's splits, tokenised, with their metric, and the model that fits them.

The names below are imported on first use: `irdscale.tasks.sources` and the readers of files do not need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from irdscale.utils.late import late_names

if TYPE_CHECKING:
    from irdscale.models.build import build_model
    from irdscale.tasks.counts import tell_classes
    from irdscale.tasks.task import Task, load_task

__all__ = ["Task", "build_model", "load_task", "tell_classes"]

_HOME = {
    "Task": "irdscale.tasks.task",
    "build_model": "irdscale.models.build",
    "load_task": "irdscale.tasks.task",
    "tell_classes": "irdscale.tasks.counts",
}

__getattr__ = late_names(__name__, _HOME)
