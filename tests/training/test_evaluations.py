"""Evaluations during a training, and the numbers that it keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale import load_adapter
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig, TrainConfig, result_settings
from irdscale.models.build import build_model
from irdscale.runs.folder import training_part
from irdscale.search.candidates import Candidate
from irdscale.search.ird import Pair
from irdscale.sparse import trained_numbers
from irdscale.tasks import Task, load_task
from irdscale.training import evaluations
from irdscale.training.control import Control
from irdscale.training.one_mask import run_train
from irdscale.training.trainable import sparse_model
from irdscale.training.trainer import fine_tune
from tests.search.toy import write_config
from tests.training_oracle import changed, mask_of
from tests.training_ranks import Stopped, same, stopper


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Task]:
    # With dropout, so that the random stream counts.
    config = load_config(write_config(tmp_path_factory.mktemp("toy")), ["train.steps=8", "train.save_minutes=0"])
    return config, load_task(config)


class Curve:
    """A selection metric that follows given numbers, and what the model held at each evaluation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *metrics: float) -> None:
        self.left, self.held = list(metrics), list[Any]()
        monkeypatch.setattr(evaluations, "evaluate_model", self)

    def __call__(self, model: Any, task: Task, split: Any, size: int) -> dict[str, float]:
        assert split is task.selection
        self.held.append(trained_numbers(model))
        return {task.metric: self.left.pop(0)}


def train(config: RunConfig, task: Task, **options: Any) -> Any:
    model = sparse_model(config, task, mask_of(config, task), 3)
    fine_tune(model, task, config, 3, **options)
    return trained_numbers(model)


@pytest.mark.parametrize("decay", ["delta", "weight"])
def test_the_numbers_of_an_early_peak_are_kept(
    toy: tuple[RunConfig, Task], decay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the training was stopped after the peak, and if its state is that of the last step."""
    config, task = changed(toy[0], eval_steps=2, keep="best", decay=decay, weight_decay=0.1), toy[1]
    plain = train(changed(config, eval_steps=None, keep="last"), task)
    curve, steps = Curve(monkeypatch, 0.5, 0.9, 0.9, 0.1), list[int]()
    same(train(config, task, control=Control(kept=steps.append)), curve.held[1], 0.0, "the first of two bests")
    same(curve.held[3], plain, 0.0, "an evaluation moves no random stream")
    # Step 6 is made twice.
    curve.left = [0.5, 0.9, 0.9, 0.9, 0.1]
    with pytest.raises(Stopped):
        train(config, task, control=Control(stopper(5)), state=tmp_path / "state")
    stored = json.loads((tmp_path / "state/state.json").read_text())
    assert (stored["step"], stored["best"]) == (5, {"step": 4, "metric": 0.9})
    again = train(config, task, control=Control(kept=steps.append), state=tmp_path / "state")
    same(again, curve.held[1], 0.0, "across a stop")
    assert curve.left == []
    monkeypatch.setattr("irdscale.training.callback.LAST_STATE_S", 0.0)
    curve.left = [0.5, 0.9, 0.9, 0.1]
    train(config, task, state=tmp_path / "whole")
    assert json.loads((tmp_path / "whole/state.json").read_text())["step"] == 8
    finished = train(config, task, control=Control(kept=steps.append), state=tmp_path / "whole")
    same(finished, curve.held[1], 0.0, "from the state of the last step")
    assert steps == [4, 4, 4]


def test_lower_is_better_and_no_number_is_never_best(
    toy: tuple[RunConfig, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, task = changed(toy[0], eval_steps=3, keep="best"), toy[1]
    steps: list[int] = []
    curve = Curve(monkeypatch, math.nan, 0.8, 0.7)
    train(config, task, control=Control(kept=steps.append))
    monkeypatch.setattr(type(task), "lower_is_better", True)
    curve.left = [0.8, math.nan, 0.7]
    train(config, task, control=Control(kept=steps.append))
    curve.left = [math.nan] * 3
    same(train(config, task, control=Control(kept=steps.append)), curve.held[-1], 0.0, "the last")
    assert steps == [6, 8, 8], "evaluations after steps 3, 6 and 8"


def test_the_adapter_and_the_result_are_those_of_the_kept_step(
    toy: tuple[RunConfig, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, task = changed(toy[0], eval_steps=2, keep="best"), toy[1]
    config = config.model_copy(update={"output": str(tmp_path / "out")})
    curve = Curve(monkeypatch, 0.5, 0.9, 0.2, 0.1)
    result = run_train(config, progress=False)
    assert json.loads((tmp_path / "out/result.json").read_text()) == result
    assert (result["kept_step"], result["steps"]) == (4, 8)
    adapted = load_adapter(build_model(config, task, 0)[0], tmp_path / "out/adapter")
    same(trained_numbers(adapted), curve.held[1], 0.0, "the adapter")
    best = result["best"]
    assert best["metric"] == result["selection"]["accuracy"] != 0.9
    assert (best["test_metric"], best["params"]) == (result["test"]["accuracy"], result["params"])
    assert torch.equal(torch.tensor(best["test_error"]), torch.tensor(result["test_error"]["accuracy"]))
    assert (tmp_path / "out" / best["adapter"]).is_dir()
    assert result["task"]["metric"] == "accuracy"
    assert result["config"]["train"]["keep"] == "best"
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["metric"] for line in lines if "metric" in line} == {2: 0.5, 4: 0.9, 6: 0.2, 8: 0.1}


def test_what_is_kept_belongs_to_a_run_and_what_is_reported_does_not(toy: tuple[RunConfig, Task]) -> None:
    config = toy[0]
    probe = Candidate(None, Pair(0, 0), 0, None, "probe")
    same_run = changed(config, report_to=["wandb"], eval_steps=3)
    best = changed(config, eval_steps=3, keep="best")
    for of in (probe.key, lambda one: training_part(one, None)):
        assert of(config) == of(same_run)
        assert of(best) == of(changed(best, report_to=["mlflow"]))
        assert len({json.dumps(of(one)) for one in (config, best, changed(best, eval_steps=4))}) == 3
    # Folders of before these keys were there are the same run.
    new = {"report_to", "eval_steps", "keep", "max_head_rate"}
    old = {key: value for key, value in config.train.model_dump().items() if key not in new}
    assert result_settings(config.train.model_dump()) == old
    with pytest.raises(ValueError, match="found 'best' without eval_steps"):
        TrainConfig.model_validate({"keep": "best"})
