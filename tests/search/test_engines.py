"""The local engine shows each training while it runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from irdscale.config.schema import RunConfig
from irdscale.search import engines
from irdscale.search.candidates import Candidate
from irdscale.search.engines import LocalEngine
from irdscale.search.ird import Pair
from irdscale.training.base_model import KeptBase
from irdscale.training.control import Control
from irdscale.utils.progress import progress_listener


def test_each_training_has_a_bar_with_its_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(config: RunConfig, task: Any, output: Path, candidate: Candidate, control: Control) -> dict[str, Any]:
        for step in (1, 2):
            assert control.seen is not None
            control.seen(step, 0.5, 1e-3)
            control.advance(1)
        return candidate.record(config)

    monkeypatch.setattr(engines, "run_candidate", run)
    sections: dict[str, Any] = {"model": {"path": "m"}, "task": {"dataset": "glue/rte"}, "train": {"steps": 2}}
    config, task = RunConfig.model_validate(sections), SimpleNamespace(trained=range(8))
    engine, heard, ended = LocalEngine(config, task, tmp_path, KeptBase(), progress=True), list[Any](), list[Any]()  # type: ignore[arg-type]
    with progress_listener(lambda *facts: heard.append(facts)):
        engine.evaluate([Candidate("m", Pair(4, 4), seed, 0, "ird") for seed in (0, 1)], ended.append)
    assert heard == 2 * [("Training", 1.0, 2, "loss 0.5000"), ("Training", 2.0, 2, "loss 0.5000")]
    assert [record["seed"] for record in ended] == [0, 1]
