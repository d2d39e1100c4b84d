"""The kinds of task: their metrics, and the columns that make their samples."""

from __future__ import annotations

from typing import Literal

Kind = Literal["sequence-classification", "regression", "causal-lm", "sft", "multiple-choice"]
# Their samples are texts that a language model continues.
LANGUAGE_KINDS = ("causal-lm", "sft", "multiple-choice")
METRICS: dict[str, tuple[str, ...]] = {
    "sequence-classification": ("accuracy", "f1", "matthews_correlation"),
    "regression": ("pearson", "spearman"),
    "causal-lm": ("perplexity", "token_accuracy"),
    "sft": ("perplexity", "token_accuracy", "exact_match"),
    "multiple-choice": ("accuracy", "accuracy_norm"),
}
KNOWN_METRICS = tuple(dict.fromkeys(name for names in METRICS.values() for name in names))
LOWER_IS_BETTER = ("perplexity",)
# The smallest and the largest value of each metric.
METRIC_RANGES = {
    **dict.fromkeys(KNOWN_METRICS, (0.0, 1.0)),
    **dict.fromkeys(("matthews_correlation", "pearson", "spearman"), (-1.0, 1.0)),
    "perplexity": (1.0, float("inf")),
}
# The sets of columns that make a sample, by kind of task.
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sequence-classification": (("text", "label"),),
    "regression": (("text", "label"),),
    "causal-lm": (("text",),),
    "sft": (
        ("prompt", "completion"),
        ("messages",),
        ("messages", "tools"),
        ("system", "prompt", "completion"),
        ("instruction", "output"),
        ("instruction", "input", "output"),
    ),
    "multiple-choice": (("prompt", "choices", "label"), ("prompt", "choices", "choice_labels", "label")),
}
