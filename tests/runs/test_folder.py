"""Whose an output folder is: the same call goes on or shows its result, any other is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from irdscale import Mask
from irdscale.compare.run import run_compare
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError, RunError
from irdscale.runs.lock import NAME, locked
from irdscale.search.run import run_search
from irdscale.training import callback
from irdscale.training.control import Control
from irdscale.training.one_mask import run_fisher, run_train
from irdscale.utils.interrupts import Interrupted, deferred
from tests.search.toy import write_config


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A toy with a training in `out`."""
    base = tmp_path_factory.mktemp("folder")
    return base, run_train(load_config(write_config(base, train__steps=8)), progress=False)


@pytest.fixture
def toy(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of it, of other file times and at another place."""
    base = tmp_path / "copy"
    shutil.copytree(done[0], base, copy_function=shutil.copy)
    write_config(base, train__steps=8)
    return base


def loaded(base: Path, *overrides: str) -> RunConfig:
    return load_config(base / "toy.yaml", list(overrides))


def flip_labels(base: Path, split: str) -> None:
    file = base / "data" / f"{split}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in rows))


def change_weights(base: Path) -> None:
    file = base / "model/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.write_bytes(data)


def test_a_copy_elsewhere_shows_the_result(
    done: tuple[Path, dict[str, Any]], toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irdscale.training.one_mask.fine_tune", None)
    again = run_train(loaded(toy, "train.save_minutes=3", "fisher.batch_size=2"), progress=False)
    assert again == done[1] | {"adapter": str(toy / "out/adapter")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda base: flip_labels(base, "train"), r"task.dataset: .*data: other samples in train\)"),
        (lambda base: flip_labels(base, "test"), r"other samples in test\)"),
        (change_weights, r"model.path: .*: other contents of model.safetensors\)"),
    ],
)
@pytest.mark.parametrize("verb", [run_train, run_fisher])
def test_other_input_is_refused_and_named(
    toy: Path, change: Callable[[Path], None], said: str, verb: Callable[..., Any]
) -> None:
    change(toy)
    before = {file: file.read_bytes() for file in (toy / "out").rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=said) as error:
        verb(loaded(toy), progress=False)
    assert all(words in str(error.value) for words in ("output=...", "--overwrite"))
    assert before == {file: file.read_bytes() for file in (toy / "out").rglob("*") if file.is_file()}


def test_other_work_is_refused_and_the_mask_of_fisher_is_shared(toy: Path, tmp_path: Path) -> None:
    for overrides, said in (
        (["train.learning_rate=1"], "train.learning_rate: 0.003 -> 1.0"),
        (["search.ratio=0.06"], "search.ratio: 0.05 -> 0.06"),
        (["task.limit.train=40"], "task.limit.train: None -> 40"),
    ):
        with pytest.raises(InputError, match=said):
            run_train(loaded(toy, *overrides), progress=False)
    with pytest.raises(InputError, match="a training, whose adapter this would replace"):
        run_search(loaded(toy), progress=False)
    mask = Mask.load(toy / "out/mask")
    assert run_fisher(loaded(toy), progress=False)["hash"] == mask.hash
    fish = loaded(toy, f"output={tmp_path / 'fish'}")
    run_fisher(fish, progress=False)
    run_train(fish, mask=str(tmp_path / "fish/mask"), progress=False)


def test_overwrite_removes_only_what_was_written(toy: Path) -> None:
    notes = [toy / "out/notes.txt", toy / "out/adapter/mine.txt", toy / "out/training.md"]
    for file in notes[::2]:
        file.write_text("mine")
    flip_labels(toy, "train")
    with pytest.raises(InputError, match=r"mask: .* is in a folder that --overwrite removes"):
        run_train(loaded(toy), mask=str(toy / "out/mask"), progress=False, overwrite=True)
    result = run_train(loaded(toy), progress=False, overwrite=True)
    assert all(file.read_text() == "mine" for file in notes[::2])
    assert run_train(loaded(toy), progress=False) == result


def test_what_has_no_record_is_left_alone(toy: Path) -> None:
    (toy / "out/fisher/run.json").unlink()
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds adapter/adapter.json without a record"):
            run_train(loaded(toy), progress=False, overwrite=overwrite)
    assert (toy / "out/adapter/adapter.json").exists()


def test_a_run_that_wrote_nothing_leaves_the_folder_to_others(toy: Path, tmp_path: Path) -> None:
    config = loaded(toy, f"output={tmp_path / 'new'}", "search.min_ratio=null")
    with pytest.raises(InputError, match=r"search\.ratio"):
        run_fisher(config.model_copy(update={"search": config.search.model_copy(update={"ratio": 1e-6})}))
    assert not (tmp_path / "new").exists()


def test_metrics_of_a_diverged_training_stay_and_hold_no_folder(toy: Path, tmp_path: Path) -> None:
    asked = [f"output={tmp_path / 'new'}", "train.warmup_ratio=0"]
    with pytest.raises(RunError, match="the loss is "):
        run_train(loaded(toy, *asked, "train.learning_rate=1e38"), mask=str(toy / "out/mask"), progress=False)
    assert (tmp_path / "new/metrics.jsonl").exists()
    assert not (tmp_path / "new/fisher").exists()
    run_train(loaded(toy, *asked, "train.steps=2"), mask=str(toy / "out/mask"), progress=False)
    lines = (tmp_path / "new/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    run_train(loaded(toy, *asked, "train.steps=3"), mask=str(toy / "out/mask"), progress=False, overwrite=True)
    assert len((tmp_path / "new/metrics.jsonl").read_text().splitlines()) == 3


def test_a_finished_search_is_not_shown_for_other_data(toy: Path, tmp_path: Path) -> None:
    asked = ["search.max_rounds=1", "search.seeds=[0]", "train.steps=2", f"output={tmp_path / 'search'}"]
    result = run_search(loaded(toy, *asked), progress=False)
    assert run_search(loaded(toy, *asked), progress=False) == result
    flip_labels(toy, "validation")
    for verb in (run_search, run_compare):
        with pytest.raises(InputError, match="other samples in selection"):
            verb(loaded(toy, *asked), progress=False)


def test_the_lock_names_its_holder_and_goes(tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    with locked(folder, "output"):
        said = rf"output: .*b: another irdscale, process {os.getpid()} on host .*, is writing it"
        with pytest.raises(InputError, match=said), locked(folder, "output"):
            pass
        assert (folder / NAME).exists()
    assert not (tmp_path / "a").exists()
    folder.mkdir(parents=True)
    (folder / NAME).write_text("left by a killed process")
    with locked(folder, "output"):
        pass
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [5, 8])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    done: tuple[Path, dict[str, Any]],
    toy: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    number: signal.Signals,
    at: int,
) -> None:
    config = loaded(toy, f"output={toy / 'again'}")

    def interrupt(self: Any, *_: Any, **__: Any) -> None:
        if self.trainer.state.global_step == at - 1:
            os.kill(os.getpid(), number)

    # Ray, if a test before has started it in this process, has set a handler of its own.
    request.addfinalizer(partial(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.SIG_DFL)))
    with monkeypatch.context() as patch:
        patch.setattr(callback.TrainingCallback, "on_step_begin", interrupt)
        patch.setattr(signal, "default_int_handler", signal.getsignal(signal.SIGINT))
        with pytest.raises(Interrupted) as ending:
            run_train(config, progress=False)
    assert ending.value.saved
    assert json.loads((toy / "again/training/state.json").read_text())["step"] == at
    steps: list[int] = []
    control = Control(lambda n=1: None, resumed=steps.append)
    monkeypatch.setattr("irdscale.training.one_mask.shown", lambda advance: control)
    result = run_train(config, progress=False)
    assert steps == [at]
    assert result["test"] == done[1]["test"]
    adapters = [(folder / "adapter/adapter.safetensors").read_bytes() for folder in (toy / "again", done[0] / "out")]
    assert adapters[0] == adapters[1]
    assert not (toy / "again/training").exists()


def test_an_interrupt_before_anything_is_saved_promises_nothing(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("irdscale.training.one_mask.make_mask", interrupted)
    for verb in (run_fisher, run_train):
        with pytest.raises(Interrupted) as ending:
            verb(loaded(toy, f"output={toy / 'new'}"), progress=False)
        assert not ending.value.saved
        assert not (toy / "new").exists()


def test_a_signal_that_nobody_answers_raises_at_the_end() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
