"""Tasks: the data's splits, tokenised, with their metric, and the model that fits them."""

from irdscale.models.build import build_model
from irdscale.tasks.counts import tell_classes
from irdscale.tasks.task import Task, load_task

__all__ = ["Task", "build_model", "load_task", "tell_classes"]
