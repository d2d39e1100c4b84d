"""Which rows are train, selection and test.

The search reads *train* and *selection*; *test* is for what is reported. Every draw is a function of `seed` and of the
data alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PARTS = ("train", "selection", "test")
TENTH = 10


@dataclass(frozen=True)
class Part:
    """Rows of one split of the source. `rows` are sorted; `origin` describes them, for messages."""

    split: str
    rows: np.ndarray
    origin: str


def _order(size: int, labels: np.ndarray | None, seed: int) -> np.ndarray:
    """A shuffle in which, given class labels, the classes follow each other: dealing it out in turn stratifies."""
    order = np.random.default_rng(seed).permutation(size)
    return order if labels is None else order[np.argsort(labels[order], kind="stable")]


def halve(size: int, labels: np.ndarray | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint halves of `size` rows, with each class halved to within one row."""
    order = _order(size, labels, seed)
    return np.sort(order[0::2]), np.sort(order[1::2])


def carve(size: int, labels: np.ndarray | None, seed: int, tenths: int) -> list[np.ndarray]:
    """The rest, then `tenths` disjoint tenths of `size` rows, with each class divided to within one row."""
    order = _order(size, labels, seed)
    turn = np.arange(size) % TENTH
    # Later turns leave most rows of a small class in the rest.
    turns = [TENTH // 2 + index for index in range(tenths)]
    return [np.sort(order[~np.isin(turn, turns)]), *(np.sort(order[turn == mine]) for mine in turns)]


def assign(labels: dict[str, np.ndarray], stratify: bool, seed: int) -> dict[str, Part]:
    """Make train, selection and test from the labelled source splits.

    With a test split, validation is selection. Without one, validation is halved. Without validation, a tenth of train
    replaces each missing split.

    Args:
        labels: the labels of `train` and, where they exist and are labelled, `validation` and `test`.
        stratify: keep the shares of the classes; for classification.
        seed: `task.split_seed`.
    """

    def classes(split: str) -> np.ndarray | None:
        return labels[split] if stratify else None

    def all_rows(split: str) -> Part:
        return Part(split, np.arange(len(labels[split])), split)

    if "validation" in labels and "test" in labels:
        return {"train": all_rows("train"), "selection": all_rows("validation"), "test": all_rows("test")}
    if "validation" in labels:
        first, second = halve(len(labels["validation"]), classes("validation"), seed)
        origin = "half of validation"
        return {
            "train": all_rows("train"),
            "selection": Part("validation", first, origin),
            "test": Part("validation", second, origin),
        }
    rest, *tenths = carve(len(labels["train"]), classes("train"), seed, 1 if "test" in labels else 2)
    parts = {"train": Part("train", rest, f"{10 - len(tenths)}0 % of train")}
    parts["selection"] = Part("train", tenths[0], "10 % of train")
    parts["test"] = all_rows("test") if "test" in labels else Part("train", tenths[1], "10 % of train")
    return parts


def draw(part: Part, limit: int, seed: int) -> Part:
    """`limit` rows of `part`; a larger limit draws the same rows and more."""
    kept = np.random.default_rng(seed).permutation(part.rows)[:limit]
    return Part(part.split, np.sort(kept), f"{limit} rows drawn from {part.origin}")
