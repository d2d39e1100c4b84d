"""Report the number of train samples of each class, and of those that `task.max_length` cuts, before training."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from irdscale.config.kinds import LANGUAGE_KINDS, Kind
from irdscale.config.task import TaskConfig
from irdscale.models.classes import SHOWN, listed
from irdscale.utils.formats import percent
from irdscale.utils.progress import say

if TYPE_CHECKING:
    from datasets import Dataset

    from irdscale.tasks.task import Task

log = logging.getLogger(__name__)
# A class is rare with fewer samples, or with a smaller share of them.
FEW, SMALL_SHARE = 2, 0.001


@dataclass(frozen=True)
class Cut:
    """Samples of the train split that are cut.

    Attributes:
        count: samples longer than `max_length` tokens.
        size: all samples.
        how: treatment of the longer samples, as text.
    """

    count: int
    size: int
    max_length: int
    how: str


def what_is_done(kind: Kind, task: TaskConfig) -> str:
    """How samples longer than `task.max_length` are treated, as text."""
    if kind == "causal-lm":
        return "cut in pieces"
    if kind in ("sft", "multiple-choice"):
        return "refused" if task.truncate is None else f"cut from the {task.truncate}"
    return "cut"


def cut_of(kind: Kind, task: TaskConfig, rows: list[int], train: Dataset) -> Cut:
    """The `Cut` of the train split, of which these rows are longer; rows of a halved part are listed twice."""
    return Cut(len(set(rows)), len(set(train["row"])), task.max_length, what_is_done(kind, task))


def tell_classes(task: Task, show: bool) -> None:
    """Print the train split's number of samples per class on stderr, and warn of rare classes.

    For every kind of task, the number of samples longer than `task.max_length` is printed first.

    Args:
        show: whether to print; warnings are always logged.
    """
    if show:
        _tell_cut(task)
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


def _tell_cut(task: Task) -> None:
    """Say on stderr how many samples of the train split are cut, if any."""
    cut = task.cut
    if cut is not None and cut.count:
        share = percent(cut.count / cut.size)
        say(
            f"Longer than task.max_length ({cut.max_length:,} tokens): {cut.count:,} of {cut.size:,} samples of train "
            f"({share}); they are {cut.how}"
        )
