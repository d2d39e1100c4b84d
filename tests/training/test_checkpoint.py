"""The state of a training on one process: whole or as it was before, and of this training or none."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError, RunError
from irdscale.sparse import trained_numbers
from irdscale.tasks import Task, load_task
from irdscale.training import checkpoint
from irdscale.training.checkpoint import saved_step
from irdscale.training.control import Control, Paused
from irdscale.training.evaluate import evaluate_model
from irdscale.training.loss_trend import loss_trend
from irdscale.training.trainable import sparse_model
from irdscale.training.trainer import fine_tune, training_order
from tests.search.toy import write_config
from tests.training_oracle import changed, mask_of
from tests.training_ranks import Stopped, same, stopper


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Task]:
    # With dropout, so that the random stream counts.
    config = load_config(write_config(tmp_path_factory.mktemp("toy")), ["train.steps=8", "train.save_minutes=0"])
    return config, load_task(config)


def train(config: RunConfig, task: Task, **options: Any) -> Any:
    model = sparse_model(config, task, mask_of(config, task), 3)
    fine_tune(model, task, config, 3, **options)
    return trained_numbers(model)


def test_a_paused_training_goes_on_to_the_same_bits(toy: tuple[RunConfig, Task], tmp_path: Path) -> None:
    """Asked to pause at its fifth step, and measured on the way, which must not move a random stream."""
    config, task = changed(toy[0], save_minutes=1000.0), toy[1]
    steps, metrics, asked, losses = [], {}, [], []
    model = sparse_model(config, task, mask_of(config, task), 3)
    trend = fine_tune(model, task, config, 3, Control(seen=lambda step, loss, rate: losses.append(loss)))
    assert trend == loss_trend(losses)
    assert len(losses) == 8
    expected = trained_numbers(model)
    model = sparse_model(config, task, mask_of(config, task), 3)

    def pausing() -> bool:
        asked.append(True)
        return len(asked) == 5

    def at_rung(step: int) -> None:
        metrics[step] = evaluate_model(model, task, task.selection, 16)["accuracy"]

    control = Control(lambda n=1: steps.append(n), pausing, frozenset({2, 6, 8}), at_rung)
    with pytest.raises(Paused, match="step 5"):
        fine_tune(model, task, config, 3, control, tmp_path / "state")
    assert sum(steps) == 5
    steps.clear()
    model = sparse_model(config, task, mask_of(config, task), 3)
    # The steps of before the pause are a part of it.
    assert fine_tune(model, task, config, 3, control, tmp_path / "state") == trend
    assert steps == [5, 1, 1, 1]
    assert set(metrics) == {2, 6}, "the last step is the end, not a rung"
    same(trained_numbers(model), expected, 0.0, "paused")


@pytest.mark.parametrize("decay", ["delta", "weight"])
def test_a_stopped_training_goes_on_to_the_same_bits(toy: tuple[RunConfig, Task], decay: str, tmp_path: Path) -> None:
    config, task = changed(toy[0], decay=decay, weight_decay=0.1), toy[1]
    expected = train(config, task)
    with pytest.raises(Stopped):
        train(config, task, control=Control(stopper(5)), state=tmp_path / "state")
    steps: list[int] = []
    found = train(config, task, control=Control(lambda n=1, **_: steps.append(n)), state=tmp_path / "state")
    assert steps == [5, 1, 1, 1]
    same(found, expected, 0.0, "resumed")


def test_the_state_of_another_training_is_not_taken(toy: tuple[RunConfig, Task], tmp_path: Path) -> None:
    config, task = toy
    with pytest.raises(Stopped):
        train(config, task, control=Control(stopper(5)), state=tmp_path / "state")
    other = changed(config, learning_rate=0.01)
    same(train(other, task, state=tmp_path / "state"), train(other, task), 0.0, "another rate")
    assert saved_step(tmp_path / "state", {"of": "something else"}) == 0
    # How it runs does not make it another one.
    with pytest.raises(Stopped):
        train(config, task, control=Control(stopper(5)), state=tmp_path / "again")
    steps: list[int] = []
    train(
        changed(config, gradient_accumulation=2),
        task,
        control=Control(lambda n=1, **_: steps.append(n)),
        state=tmp_path / "again",
    )
    assert steps[0] == 5


def test_a_full_disk_keeps_the_state_before(
    toy: tuple[RunConfig, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, task = toy
    expected, writes = train(config, task), []
    real = checkpoint.write_json

    def full(path: Path, value: Any) -> None:
        writes.append(1)
        if len(writes) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, value)

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(RunError, match=r"cannot write .*state: No space left on device"):
        train(config, task, state=tmp_path / "state")
    monkeypatch.setattr(checkpoint, "write_json", real)
    assert [p.name for p in tmp_path.iterdir()] == ["state"], "nothing half-written is left"
    steps: list[int] = []
    same(
        train(config, task, control=Control(lambda n=1, **_: steps.append(n)), state=tmp_path / "state"),
        expected,
        0.0,
        "disk",
    )
    assert steps[0] == 3


def test_damaged_states_are_refused(toy: tuple[RunConfig, Task], tmp_path: Path) -> None:
    config, task = toy
    state = tmp_path / "state"
    with pytest.raises(Stopped):
        train(config, task, control=Control(stopper(5)), state=state)
    numbers = state / "numbers.safetensors"
    whole = numbers.read_bytes()
    numbers.write_bytes(whole[:-5])
    with pytest.raises(InputError, match=r"numbers.safetensors: damaged training state"):
        train(config, task, state=state)
    numbers.write_bytes(whole)
    (state / "state.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match=r"state.json: found no training state; expected format .irdscale-training."):
        train(config, task, state=state)


def test_the_order_of_samples_is_that_of_the_seed() -> None:
    order = training_order(7, 20, 1)
    assert order == training_order(7, 20, 1)
    assert order[:10] == training_order(7, 10, 1)
    assert order != training_order(7, 20, 2)
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14]


def test_the_head_of_a_bfloat16_model_has_float32_numbers(toy: tuple[RunConfig, Task]) -> None:
    """Steps far below the head's own resolution add up."""
    config, task = toy
    low = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    low = changed(low, learning_rate=1e-5, steps=4)
    model = sparse_model(low, task, None, 0)
    head: Any = model.get_submodule("classifier")
    before = head.weight.detach().clone()
    fine_tune(model, task, low, 0)
    values = head.weight_values
    assert values.dtype == torch.float32
    assert head.weight.dtype == torch.bfloat16
    moved = (values.detach().view_as(before) - before.float()).abs()
    assert float(moved.max()) > 0
    assert float(moved.max()) < 1e-4
