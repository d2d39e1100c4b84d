"""First values of a configuration, as the shipped ones have them for such models and data."""

from __future__ import annotations

from typing import Any

from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.models.glance import Glance

# Parameters from which a decoder counts as large (configs/llm), as one of 7B or more, and up to which as tiny.
LARGE, HUGE, TINY = 500_000_000, 6_000_000_000, 5_000_000
# Parameters from which an encoder counts as base-sized (configs/glue_rte_roberta.yaml).
BASE = 60_000_000
# Fewest and most passes of one training over the samples, steps below which there are more, and most steps.
EPOCHS, FEW, STEPS = (3, 10), 60, 200
# Fewest steps of a pass.
PARTS = 8
# Most samples of the selection and the test split.
MEASURED = 512
Values = dict[str, tuple[Any, str]]


def first_values(kind: str, model: Glance | None, train_rows: int | None, rows: int | None) -> tuple[Values, list[str]]:
    """Values of the sections fisher, search and train, and of model.dtype and task.limit.

    Args:
        kind: kind of task.
        model: None if the user names none.
        train_rows: rows of the split train that are trained on; None if unknown.
        rows: all rows of the split that selection and test are taken from; None if unknown.

    Returns:
        key -> its value and a comment; and what was assumed, in sentences.
    """
    language = kind in LANGUAGE_KINDS
    is_decoder = language if model is None or model.kind == "unknown" else model.kind == "decoder"
    parameters = None if model is None else model.parameters
    values, assumed = _decoder(parameters, language) if is_decoder else _encoder(parameters)
    size = train_rows or 10**9
    samples = min(int(values["fisher.samples"][0]), _power_of_two(size))
    values["fisher.samples"] = samples, "samples at the start of the search; fewer in each round"
    batch = min(int(values["train.batch_size"][0]), _power_of_two(max(1, size // PARTS)))
    values["train.batch_size"] = batch, "samples of one optimizer step"
    if "train.gradient_accumulation" in values:
        parts = min(int(values["train.gradient_accumulation"][0]), batch)
        values["train.gradient_accumulation"] = parts, f"passes of {batch // parts} samples; fewer need more memory"
    values["fisher.batch_size"] = min(int(values["fisher.batch_size"][0]), samples), values["fisher.batch_size"][1]
    once = -(-size // batch)
    epochs = min(EPOCHS[1], max(EPOCHS[0], -(-FEW // once)))
    if epochs * once <= STEPS:
        values["train.epochs"] = epochs, f"passes over the train split: {epochs * once} steps"
    else:
        values["train.steps"] = STEPS, "optimizer steps of one training"
    if rows is not None and rows > 10 * MEASURED:
        text = "samples that measure each candidate, and the winner"
        values["task.limit"] = {"selection": MEASURED, "test": MEASURED}, text
        assumed.append(f"task.limit: {MEASURED} samples each measure the candidates and the winner")
    return values, assumed


def _decoder(parameters: int | None, language: bool) -> tuple[Values, list[str]]:
    if parameters is not None and parameters < TINY:
        ratio, rate, dtype, like = 0.02, 1e-2 if language else 3e-3, "float32", "a tiny decoder (README.md)"
    elif parameters is not None and parameters < LARGE:
        ratio, rate, dtype, like = 0.01, 1e-3, "float32", "a small decoder (configs/smollm2_gsm8k.yaml)"
    elif parameters is not None and parameters < HUGE:
        ratio, rate, dtype, like = 0.005, 1e-3, "bfloat16", "a decoder of 0.5 to 6 billion parameters (configs/llm)"
    else:
        ratio, rate, dtype, like = 0.002, 1e-3, "bfloat16", "a large decoder (configs/llm)"
    large = dtype == "bfloat16"
    size = "" if parameters is not None else "; its size is unknown"
    values: Values = {
        "model.dtype": (dtype, "of the base weights; trained deltas are float32"),
        "fisher.samples": (256, ""),
        "fisher.batch_size": (
            2 if ratio == 0.002 else 4 if large else 8,
            "samples of one Fisher pass; more need more memory",
        ),
        "search.ratio": (ratio, "share of the parameters at the start; smaller in each round"),
        "search.max_rounds": (4 if large else 3, "rounds of the search at most"),
        "search.seeds": ([0, 1], "each candidate is trained once for each seed"),
        "train.batch_size": (32 if large else 16, ""),
        **({"train.gradient_accumulation": (8, "")} if large else {}),
        "train.eval_batch_size": (16 if large else 32, "samples of one forward pass of an evaluation"),
        "train.learning_rate": (rate, "of the trained entries alone: larger than for full fine-tuning"),
    }
    return values, [f"values as for {like}{size}"]


def _encoder(parameters: int | None) -> tuple[Values, list[str]]:
    base = parameters is not None and parameters >= BASE
    rate = 1e-3 if base else 2e-3
    tiny = parameters is not None and parameters < TINY
    values: Values = {
        "model.dtype": ("float32", "of the base weights"),
        "fisher.samples": (256, ""),
        "fisher.batch_size": (8, "samples of one Fisher pass; more need more memory"),
        "search.ratio": (0.02 if tiny else 0.005, "share of the parameters at the start; smaller in each round"),
        "search.max_rounds": (4, "rounds of the search at most"),
        "search.seeds": ([0, 1], "each candidate is trained once for each seed"),
        "train.batch_size": (16, ""),
        "train.learning_rate": (rate, "of the trained entries and the head: larger than for full fine-tuning"),
    }
    like = "configs/glue_rte_roberta.yaml" if base else "configs/own_data.yaml"
    return values, [f"values as for an encoder ({like})"]


def _power_of_two(size: int) -> int:
    """The largest power of two that is not above a number of 1 or more."""
    return 1 << (max(1, size).bit_length() - 1)
