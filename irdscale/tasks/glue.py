"""The nine GLUE tasks (Wang et al. 2018), by name."""

from __future__ import annotations

from dataclasses import dataclass

from irdscale.config.kinds import Kind
from irdscale.errors import InputError
from irdscale.utils.suggestions import nearest

HUB_ID = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One GLUE task: its columns, its classes in the order of their numbers, and its metrics.

    `metrics` begins with the main one, which the search maximises: the one that Devlin et al. 2018 report.
    """

    name: str
    text: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    kind: Kind = "sequence-classification"
    validation: str = "validation"
    label: str = "label"


_PAIR = ("sentence1", "sentence2")

GLUE = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation", "accuracy")),
        GlueTask("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        GlueTask("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
        GlueTask("stsb", _PAIR, (), ("spearman", "pearson"), kind="regression"),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            validation="validation_matched",
        ),
        GlueTask("qnli", ("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
        GlueTask("rte", _PAIR, ("entailment", "not_entailment"), ("accuracy",)),
        GlueTask("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",)),
    )
}


def glue_task(name: str) -> GlueTask:
    """The GLUE task called `name`.

    Raises:
        InputError: there is none; the error names the nearest.
    """
    if name not in GLUE:
        raise InputError(f"found GLUE task {name!r}{nearest(name, GLUE)}", f"one of {', '.join(GLUE)}", "task.dataset")
    return GLUE[name]
