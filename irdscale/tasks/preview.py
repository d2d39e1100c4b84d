"""Show what a model would learn from a configuration's data, without its weights: the verb `data`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from irdscale.config.kinds import Kind
from irdscale.config.schema import RunConfig
from irdscale.models.chunked_losses import IGNORED
from irdscale.tasks.counts import what_is_done
from irdscale.tasks.refused import Refused
from irdscale.tasks.splits import PARTS
from irdscale.tasks.task import Task, load_task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# More tokens than any sample has.
NO_LIMIT = 2**30
# Most samples shown of each split, and most refused rows named.
SHOWN = 3
NAMED = 20
# Text for a part of a character, and most tokens of one character.
PART, MOST_PARTS = "\N{REPLACEMENT CHARACTER}", 4


def run_data(config: RunConfig) -> dict[str, Any]:
    """Samples, learned tokens and lengths of a configuration's data.

    Reads the model's configuration and tokenizer, but no weights. Lengths are from before `task.max_length` cuts.

    Returns:
        {"task", "kind", "max_length", "longer_are", "splits", "refused"}. `longer_are` says how samples of more than
        `max_length` tokens are treated. `refused` has "rows", "at_least" (whether there may be more) and "first", each
        with "split", "row" and "why". Each split has

        - "origin", "samples", and "classes" (name -> samples), "values" (regression) or "right_choices" (number ->
          samples);
        - "tokens": "median", "p95", "longest", "cut" (longer samples), "cut_share", and for language models
          "learned_share";
        - "blocks", for packed texts;
        - "shown": samples with "row", "tokens" (as text), "learned" (one bool for each token), and "label" if they have
          one.

    Raises:
        InputError: as `load_task`, except that single refused rows are returned.
    """
    packing, limit = config.task.packing, config.task.max_length
    plain = config.task.model_copy(update={"pool": None, "packing": False})
    fisher = config.fisher.model_copy(update={"samples": 1})
    config = config.model_copy(update={"task": plain, "fisher": fisher})
    refused = Refused()
    uncut = load_task(_limited(config, NO_LIMIT), refused=refused)
    longer_are = what_is_done(uncut.kind, config.task)
    lengths = {name: _sample_lengths(uncut.kind, getattr(uncut, name)) for name in PARTS}
    shown, first = uncut, list(refused.rows)
    if longer_are == "refused":
        first += _too_long(uncut, lengths, limit)
    elif any((each > limit).any() for each in lengths.values()):
        # Shown samples are cut as in training. Other rows may be refused when they are cut from the left.
        refused = Refused()
        with without_warnings():
            shown = load_task(config, refused=refused)
        first = list(refused.rows)
    return {
        "task": uncut.name,
        "kind": uncut.kind,
        "max_length": limit,
        "longer_are": longer_are,
        "splits": {
            name: {
                "origin": uncut.origin[name],
                "samples": len(getattr(uncut, name)),
                **_labels(uncut, getattr(uncut, name)),
                "tokens": _lengths(uncut, getattr(uncut, name), lengths[name], limit),
                **({"blocks": int(lengths[name].sum()) // limit} if packing and name == "train" else {}),
                "shown": _shown(shown, getattr(shown, name), limit),
            }
            for name in PARTS
        },
        "refused": {
            "rows": len(first),
            "at_least": refused.is_part,
            "first": [{"split": split, "row": row, "why": why} for split, row, why in first[:NAMED]],
        },
    }


def _limited(config: RunConfig, max_length: int) -> RunConfig:
    return config.model_copy(update={"task": config.task.model_copy(update={"max_length": max_length})})


@contextmanager
def without_warnings() -> Iterator[None]:
    """Log no warnings in the body; the earlier load has logged them."""
    logger = logging.getLogger("irdscale.tasks")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _sample_lengths(kind: Kind, samples: Dataset) -> np.ndarray:
    """Tokens of each sample [N]; for multiple choice, with the longest choice."""
    if kind == "multiple-choice":
        return np.asarray([max(map(len, choices)) for choices in samples["choices"]], dtype=np.int64)
    return np.asarray([len(tokens) for tokens in samples["input_ids"]], dtype=np.int64)


def _too_long(task: Task, lengths: dict[str, np.ndarray], limit: int) -> list[tuple[str, int, str]]:
    """Split, row and reason of each row that `task.max_length` refuses."""
    return [
        (
            name,
            row,
            f"task.max_length: {task.name}: {task.origin[name]}, row {row}: found {tokens} tokens; expected at most "
            f"{limit}, or task.truncate=left",
        )
        for name in PARTS
        for row, tokens in zip(getattr(task, name)["row"], lengths[name].tolist(), strict=True)
        if tokens > limit
    ]


def _labels(task: Task, samples: Dataset) -> dict[str, Any]:
    """Number of samples for each class or right choice; the range of values for regression."""
    if task.kind == "multiple-choice":
        places, counts = np.unique(np.asarray(samples["answer"]), return_counts=True)
        return {"right_choices": {str(place): int(count) for place, count in zip(places, counts, strict=True)}}
    if task.is_language:
        return {}
    labels_N = np.asarray(samples.with_format("numpy")["labels"])
    if task.kind == "regression":
        values = {"smallest": labels_N.min(), "median": np.median(labels_N), "largest": labels_N.max()}
        return {"values": {name: round(float(value), 6) for name, value in values.items()}}
    counts = np.bincount(labels_N, minlength=len(task.label_names))
    order = task.class_order or range(len(task.label_names))
    return {"classes": {task.label_names[number]: int(counts[number]) for number in order}}


def _lengths(task: Task, samples: Dataset, lengths_N: np.ndarray, limit: int) -> dict[str, Any]:
    cut = int((lengths_N > limit).sum())
    found = {
        "median": int(np.median(lengths_N)),
        "p95": int(np.percentile(lengths_N, 95)),
        "longest": int(lengths_N.max()),
        "cut": cut,
        "cut_share": cut / len(lengths_N),
    }
    if task.is_language:
        learned = sum(label != IGNORED for labels in samples["labels"] for label in labels)
        found["learned_share"] = learned / sum(map(len, samples["labels"]))
    return found


def _shown(task: Task, samples: Dataset, limit: int) -> list[dict[str, Any]]:
    """The first, the middle and the last sample that fit `limit` tokens."""
    places = np.flatnonzero(_sample_lengths(task.kind, samples) <= limit)
    chosen = sorted({int(places[(len(places) - 1) * i // (SHOWN - 1)]) for i in range(SHOWN)}) if places.size else []
    return [_sample(task, samples[place]) for place in chosen]


def _sample(task: Task, sample: dict[str, Any]) -> dict[str, Any]:
    ids = list(sample["input_ids"])
    found: dict[str, Any] = {"row": int(sample["row"]), "tokens": token_texts(task.tokenizer, ids)}
    if task.is_language:
        found["learned"] = [label != IGNORED for label in sample["labels"]]
        if task.kind == "multiple-choice":
            found["label"] = int(sample["answer"])
    else:
        found["learned"] = [False] * len(ids)
        found["label"] = task.label_names[sample["labels"]] if task.label_names else float(sample["labels"])
    return found


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds, including spaces and special tokens.

    If several tokens make one character, the last one gets it and the others get a replacement character.
    """

    def decoded(start: int, stop: int) -> str:
        tokens = ids[start:stop]
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    found = []
    # The text of a token depends on the token before it. Complete characters end at `read`.
    before, read = 0, 0
    for place, token in enumerate(ids):
        known, text = decoded(before, read), decoded(before, place + 1)
        if text.endswith(PART) and place - read < MOST_PARTS:
            found.append(PART)
            continue
        adds = text.startswith(known) and len(text) > len(known)
        found.append(text[len(known) :] if adds else str(tokenizer.convert_ids_to_tokens(token)))
        before, read = read, place + 1
    return found
