"""The table of the nine GLUE tasks."""

from __future__ import annotations

import pytest

from irdscale.config.kinds import METRICS
from irdscale.errors import InputError
from irdscale.tasks.glue import GLUE, glue_task


def test_nine_tasks_with_metrics_that_fit() -> None:
    assert set(GLUE) == {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}
    for name, task in GLUE.items():
        assert task.name == name
        regression = name == "stsb"
        assert (task.kind == "regression") == regression
        assert set(task.metrics) <= set(METRICS[task.kind])
        assert len(task.label_names) == (0 if regression else 3 if name == "mnli" else 2)
        assert len(task.text) == (1 if name in ("cola", "sst2") else 2)
    assert GLUE["mnli"].validation == "validation_matched"
    assert GLUE["rte"].label_names[0] == "entailment"


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match=r"task\.dataset: found GLUE task 'rtee' \(did you mean \"rte\"\?\)"):
        glue_task("rtee")
