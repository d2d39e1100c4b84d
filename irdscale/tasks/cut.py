"""Count the samples that `task.max_length` cuts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from irdscale.config.kinds import Kind
from irdscale.config.task import TaskConfig
from irdscale.utils.formats import percent
from irdscale.utils.progress import say

if TYPE_CHECKING:
    from irdscale.tasks.task import Task

# More tokens than any sample has.
NO_LIMIT = 2**30


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


def sample_lengths(kind: Kind, samples: Dataset) -> np.ndarray:
    """Tokens of each sample [N]; for multiple choice, with the longest choice."""
    if kind == "multiple-choice":
        return np.asarray([max(map(len, choices)) for choices in samples["choices"]], dtype=np.int64)
    return np.asarray([len(tokens) for tokens in samples["input_ids"]], dtype=np.int64)


def cut_texts(kind: Kind, samples: Dataset, task: TaskConfig, make: Callable[[np.ndarray, TaskConfig], Dataset]) -> Cut:
    """Count the samples of a language model that are cut.

    Args:
        make: makes the samples of rows with settings.
    """
    how = what_is_done(kind, task)
    rows, pieces = np.unique(np.asarray(samples["row"]), return_counts=True)
    if kind == "causal-lm":
        return Cut(int((pieces > 1).sum()), len(rows), task.max_length, how)
    count = 0
    if task.truncate is not None:
        full = np.asarray(samples["row"])[sample_lengths(kind, samples) >= task.max_length]
        if full.size:
            uncut = make(full, task.model_copy(update={"max_length": NO_LIMIT}))
            count = int((sample_lengths(kind, uncut) > task.max_length).sum())
    return Cut(count, len(rows), task.max_length, how)


def tell_cut(task: Task) -> None:
    """Say on stderr how many samples of the train split are cut, if any."""
    cut = task.cut
    if cut is not None and cut.count:
        share = percent(cut.count / cut.size)
        say(
            f"Longer than task.max_length ({cut.max_length:,} tokens): {cut.count:,} of {cut.size:,} samples of train "
            f"({share}); they are {cut.how}"
        )
