"""Report the number of train samples of each class, before training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.models.classes import SHOWN, listed
from irdscale.tasks.cut import tell_cut
from irdscale.utils.progress import say

if TYPE_CHECKING:
    from irdscale.tasks.task import Task

log = logging.getLogger(__name__)
# A class is rare with fewer samples, or with a smaller share of them.
FEW, SMALL_SHARE = 2, 0.001


def tell_classes(task: Task, show: bool) -> None:
    """Print the train split's number of samples per class on stderr, and warn of rare classes.

    For every kind of task, the number of samples longer than `task.max_length` is printed first.

    Args:
        show: whether to print; warnings are always logged.
    """
    if show:
        tell_cut(task)
    if task.kind in LANGUAGE_KINDS or not task.label_names:
        return
    labels_N = np.asarray(task.train.with_format("numpy")["labels"])
    counts = np.bincount(labels_N, minlength=len(task.label_names))
    size, order = len(labels_N), task.class_order or range(len(task.label_names))
    origin = "" if task.origin["train"] == "train" else f" ({task.origin['train']})"
    said = [f"{task.label_names[number]} {counts[number]:,}" for number in order]
    if show:
        say(f"Classes of train{origin}: {listed(said)}")
    few = max(FEW, SMALL_SHARE * size)
    rare = [number for number in order if counts[number] < few]
    for number in rare[:SHOWN]:
        first = np.flatnonzero(labels_N == number)[:1]
        row = f"first in row {task.train[int(first[0])]['row']}" if first.size else "in no row"
        log.warning(
            "task.dataset: %s: class %r has %d of %s samples of train%s, %s; expected %d or more",
            task.name,
            task.label_names[number],
            counts[number],
            f"{size:,}",
            origin,
            row,
            int(np.ceil(few)),
        )
    if len(rare) > SHOWN:
        log.warning("task.dataset: %s: %d more classes are as rare", task.name, len(rare) - SHOWN)
