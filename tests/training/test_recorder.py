"""The metrics of a training in metrics.jsonl and in trackers, against a loop of its own, and across a resume."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers import TrainerCallback

from irdscale.config.schema import RunConfig, TrainConfig
from irdscale.errors import InputError, RunError
from irdscale.search.candidates import Candidate, run_candidate
from irdscale.search.ird import Pair
from irdscale.tasks import Task, load_task
from irdscale.training import trackers
from irdscale.training.control import Control, SmoothedLoss, shown
from irdscale.training.metrics_file import MetricsFile
from irdscale.training.one_mask import run_train
from irdscale.training.recorder import Records
from irdscale.training.trainable import sparse_model
from irdscale.training.trainer import fine_tune, training_order
from tests.training_oracle import changed, load, mask_of, oracle, toy
from tests.training_ranks import Stopped, stopper


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Task]:
    config = load(toy(tmp_path_factory.mktemp("toy"), "bert"), "model.dtype=float64")
    return config, load_task(config)


def records_in(folder: Path) -> Records:
    return Records(folder / "metrics.jsonl", "a run", folder / "tensorboard")


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_metrics_equal_a_loop_of_their_own_across_a_stop(given: tuple[RunConfig, Task], tmp_path: Path) -> None:
    """A stop after step 10, whose state is that of step 9; then half a line. No step is lost or there twice."""
    config, task = changed(given[0], steps=20, save_minutes=0.0, eval_steps=8), given[1]
    mask, records = mask_of(config, task), records_in(tmp_path)
    expected = oracle(config, task, mask, 3)
    control, state = Control(stopper(9)), tmp_path / "state"
    with pytest.raises(Stopped):
        fine_tune(sparse_model(config, task, mask, 3), task, config, 3, control, state, records)
    assert [line["step"] for line in lines_of(records.file)] == list(range(1, 11))
    with records.file.open("a") as stream:
        stream.write('{"step": 11, "lo')
    seen: list[float] = []
    control = Control(seen=lambda step, loss, rate: seen.append(loss))
    fine_tune(sparse_model(config, task, mask, 3), task, config, 3, control, state, records)
    lines = lines_of(records.file)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["loss"] for line in lines] == pytest.approx(expected.losses, rel=1e-9)
    assert seen == [line["loss"] for line in lines][9:]
    assert [line["grad_norm"] for line in lines] == pytest.approx(expected.norms, rel=1e-7)
    rates = [step / 2 if step < 2 else (20 - step) / 18 for step in range(20)]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01 * rate for rate in rates])
    assert [line["step"] for line in lines if "metric" in line] == [8, 16, 20]
    # With a state at every step each line is a measurement of its own.
    order = training_order(len(task.trained), 160, 3)
    for line in lines:
        batch = order[8 * line["step"] - 8 : 8 * line["step"]]
        tokens = sum(len(task.trained[i]["input_ids"]) for i in batch)
        assert line["tokens_per_second"] / line["samples_per_second"] == pytest.approx(tokens / 8, rel=1e-2)


def test_a_new_training_begins_the_file_anew(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "metrics.jsonl"
    MetricsFile(file, 0).append([{"step": step} for step in (1, 2, 3)])
    found = MetricsFile(file, 2)
    found.append([{"step": 3, "loss": 1.0}])
    found.sync()
    assert lines_of(file) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    file.write_bytes(file.read_bytes() + b"[]\nno json\n\xff\n" + b'{"step": 2}\n{"step": 4}')
    MetricsFile(file, 9)
    assert lines_of(file) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    MetricsFile(file, 0)
    assert file.read_bytes() == b""
    with pytest.raises(RunError, match="cannot write"):
        MetricsFile(file / "below", 0).append([{"step": 1}])


def test_gradient_norms_that_are_no_numbers_are_null(given: tuple[RunConfig, Task], tmp_path: Path) -> None:
    """JSON has no infinity, and the loss of the step is a number still."""
    config, task = changed(given[0], steps=2), given[1]
    model = sparse_model(config, task, None, 0)
    model.get_parameter("classifier.weight").register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RunError, match="the loss is nan at step 2"):
        fine_tune(model, task, config, 0, records=records_in(tmp_path))
    (line,) = lines_of(tmp_path / "metrics.jsonl")
    assert (line["step"], line["grad_norm"]) == (1, None)


def test_the_bar_shows_the_smoothed_loss() -> None:
    smoothed = SmoothedLoss()
    assert smoothed.value is None
    for loss in (1.0, 2.0):
        smoothed.add(loss)
    assert smoothed.value == pytest.approx((0.9 * 0.1 * 1.0 + 0.1 * 2.0) / (0.9 * 0.1 + 0.1))
    heard: list[tuple[Any, ...]] = []
    control = shown(lambda n=1, loss=None, earlier=False: heard.append((n, loss, earlier)))
    assert control.resumed is not None
    assert control.seen is not None
    control.resumed(5)
    control.advance(1)
    control.seen(7, 0.25, 1e-3)
    control.advance(1)
    assert heard == [(5, None, True), (1, None, False), (1, 0.25, False)]


def test_a_candidate_has_a_folder_of_its_own(given: tuple[RunConfig, Task], tmp_path: Path) -> None:
    config, task = changed(given[0], steps=3, eval_steps=2, keep="best"), given[1]
    probe = Candidate(None, Pair(0, 0), 0, None, "a/b")
    record = run_candidate(config, task, tmp_path, probe)
    assert record["status"] == "ok", record
    name = f"a-b-0samples-0parameters-seed0-{probe.key(config)[:8]}"
    assert probe.name(config) == name
    lines = lines_of(tmp_path / "trainings" / name / "metrics.jsonl")
    assert [line.get("metric") is None for line in lines] == [True, False, False]
    metrics = {line["step"]: line["metric"] for line in lines[1:]}
    assert record["metric"] == metrics[record["kept_step"]] == max(metrics.values())
    assert Candidate("m", Pair(4, 9), 1, 2, "ird").name(config) == "round2-4samples-9parameters-seed1"


def test_tensorboard_gets_every_step(given: tuple[RunConfig, Task], tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    config = changed(given[0], steps=4, eval_steps=2, report_to=["tensorboard"])
    config = config.model_copy(update={"output": str(tmp_path / "out")})
    result = run_train(config, progress=False)
    (file,) = (tmp_path / "out/tensorboard").iterdir()
    data, found, place = file.read_bytes(), dict[tuple[str, int], float](), 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 8], "little")
        event = Event.FromString(data[place + 12 : place + 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        place += 16 + size
    for line in lines_of(tmp_path / "out/metrics.jsonl"):
        assert found["train/loss", line["step"]] == pytest.approx(line["loss"])
        assert found["train/grad_norm", line["step"]] == pytest.approx(line["grad_norm"])
    assert found["eval/accuracy", 4] == pytest.approx(result["best"]["metric"])
    # Another tracker, or none, is the same run.
    again = changed(config, report_to=[], eval_steps=None)
    assert run_train(again, progress=False) == result


class Tracker(TrainerCallback):
    """A tracker that hears of everything; it fails where it should."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.failing = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.failing == "begin":
            raise ValueError("no key\nsecond line")
        self.heard.append(args.run_name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.failing == "log" and state.global_step == 2:
            raise ConnectionError("no network")
        self.heard.append((state.global_step, logs))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.heard.append("end")


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """What stands for the integration of MLflow."""
    found = Tracker()
    integrations = transformers.integrations
    monkeypatch.setattr(integrations, "get_reporting_integration_callbacks", lambda names: [lambda: found])
    return found


def test_trackers_get_named_runs_that_end(
    given: tuple[RunConfig, Task], tmp_path: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    config, task = changed(given[0], steps=3, report_to=["mlflow"]), given[1]

    def train(control: Control | None = None) -> None:
        fine_tune(sparse_model(config, task, None, 0), task, config, 0, control, records=records_in(tmp_path))

    train()
    name, *steps, last = tracker.heard
    assert (name, last) == ("a run", "end")
    assert [step for step, _ in steps] == [1, 2, 3]
    assert steps[0][1].keys() == {"loss", "learning_rate", "grad_norm", "samples_per_second", "tokens_per_second"}
    # A stopped training ends its run too.
    tracker.heard.clear()
    with pytest.raises(Stopped):
        train(Control(stopper(1)))
    assert (tracker.heard[0], tracker.heard[-1]) == ("a run", "end")
    # A lost network does not end a training.
    tracker.heard.clear()
    tracker.failing = "log"
    with caplog.at_level(logging.WARNING):
        train()
    assert [step for step, _ in tracker.heard[1:]] == [1]
    assert caplog.messages == ["train.report_to: mlflow failed, and gets no more metrics: no network"]
    tracker.failing = "begin"
    with pytest.raises(InputError, match=r"^train.report_to: mlflow cannot start: no key; expected a working mlflow"):
        train()


def test_wandb_gets_a_run_for_each_training(
    given: tuple[RunConfig, Task], tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its integration leaves the run open, and would log the next training into it; a caller's own run stays open."""
    finished: list[int] = []
    wandb: Any = SimpleNamespace(run=None, finish=lambda: finished.append(1))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config, task = changed(given[0], steps=1, report_to=["wandb"]), given[1]
    for run in (None, object()):
        wandb.run = run
        fine_tune(sparse_model(config, task, None, 0), task, config, 0, records=records_in(tmp_path))
    assert tracker.heard.count("end") == 2
    assert finished == [1]


def test_a_missing_package_is_one_line_before_anything(
    given: tuple[RunConfig, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from irdscale.compare.run import run_compare
    from irdscale.search.run import run_search

    for name in ("wandb", "trackio"):
        monkeypatch.setattr(transformers.integrations, f"is_{name}_available", lambda: False)
    config = changed(given[0], report_to=["wandb", "tensorboard", "trackio"])
    config = config.model_copy(update={"output": str(tmp_path / "out")})
    for verb in (run_train, run_search, run_compare):
        with pytest.raises(InputError) as error:
            verb(config, progress=False)
        expected = "train.report_to: found wandb, trackio without the packages; expected pip install wandb trackio"
        assert str(error.value) == expected
    assert not list(tmp_path.glob("out/*.json*"))
    assert trackers.missing_trackers(config) == {"wandb": "wandb", "trackio": "trackio"}
    with pytest.raises(ValueError, match="distinct"):
        TrainConfig.model_validate({"report_to": ["wandb", "wandb"]})
