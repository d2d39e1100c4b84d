"""Searches and calls on one Ray cluster: side by side, failing, and refused. Their processes keep their imports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs ray[tune]")

from irdscale.cli.command_line import run
from irdscale.compare.budget import OutOfTime
from irdscale.config.loader import load_config
from irdscale.errors import InputError, RunError
from irdscale.search import ray_engine as engine_module
from irdscale.search.candidates import Candidate
from irdscale.search.ird import Pair
from irdscale.search.ledger import read_ledger
from irdscale.search.ray_engine import ray_engine
from irdscale.search.run import run_search
from irdscale.search.runner import WorkItem
from irdscale.tasks import load_task
from tests.search import calls, ray_toy
from tests.search.toy import write_config


@pytest.fixture(scope="module", autouse=True)
def _one_cluster() -> Iterator[None]:
    with ray_toy.one_cluster():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    write_config(folder)
    return folder


def test_calls_run_side_by_side(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder / "toy.yaml", ["search.runner=ray", "search.ray.silent_minutes=5"])
    other = config.model_copy(update={"fisher": config.fisher.model_copy(update={"seed": 7})})
    ended: dict[int, Any] = {}
    with ray_engine(config, load_task(config), tmp_path, progress=False) as engine:
        # The last needs the place of one that has ended.
        both = [WorkItem(calls.meets, (0, 1)), WorkItem(calls.meets, (1, 0), other), WorkItem(calls.fails_once)]
        found = engine.call_all(both, ended.__setitem__)
        assert found == [(0, config.fisher.seed), (1, 7), "done"]
        assert ended == dict(enumerate(found))
        with pytest.raises(InputError, match="found too few"):
            engine.call_all([WorkItem(calls.meets, (5, 6)), WorkItem(calls.refuses)])
        # Both processors are free again.
        assert engine.call_all([WorkItem(calls.meets, (2, 3)), WorkItem(calls.meets, (3, 2))])[1][0] == 3


def test_what_starts_is_asked_for_and_after_a_refusal_what_runs_ends(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 0 runs beside seeds 1 and 2, until seed 3 is refused."""
    monkeypatch.setattr(engine_module, "evaluate_candidate", calls.evaluates)
    config = load_config(folder / "toy.yaml", ["search.runner=ray"])
    events: list[str] = []
    expected = ["starts 0", "starts 1", "ends 1", "starts 2", "ends 2", "refuses 3", "ends 0"]

    def starting(what: Any) -> None:
        seed = what if isinstance(what, int) else what.seed
        events.append(f"starts {seed}" if seed < 3 else f"refuses {seed}")
        if seed == 3:
            (tmp_path / "refused").touch()
            raise OutOfTime("too late", 1.0, 0.0)

    with ray_engine(config, load_task(config), tmp_path, progress=False) as engine:
        candidates = [Candidate("mask", Pair(4, 4), seed, None, "ird") for seed in range(5)]
        with pytest.raises(OutOfTime, match="too late"):
            engine.evaluate(candidates, lambda record: events.append(f"ends {record['seed']}"), starting)
        assert events == expected
        events.clear()
        (tmp_path / "refused").unlink()
        items = [WorkItem(calls.last_or_not, (seed,)) for seed in range(5)]
        with pytest.raises(OutOfTime, match="too late"):
            engine.call_all(items, lambda place, result: events.append(f"ends {place}"), starting)
        assert events == expected
        events.clear()
        with pytest.raises(OutOfTime):
            engine.evaluate(candidates[3:], lambda record: None, starting)
        with pytest.raises(OutOfTime):
            engine.call_all(items, lambda place, result: None, lambda place: starting(place + 3))
        assert events == 2 * ["refuses 3"]


def test_all_failing_ends_with_the_error(folder: Path) -> None:
    overrides = [f"output={folder / 'nan'}", "search.runner=ray", "search.seeds=[0]", "train.learning_rate=1e38"]
    with pytest.raises(RunError, match=r"the start, .* could not be evaluated: TrainingError: the loss is .* at step"):
        run_search(load_config(folder / "toy.yaml", [*overrides, "train.warmup_ratio=0"]), progress=False)
    (record,) = read_ledger(folder / "nan/ledger.jsonl")
    assert record["status"] == "failed"
    assert "\n" not in record["error"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.ray.ranks=5", "train.batch_size"),
        ("search.ray.ranks=8", r"search.ray.ranks: found 8 x 1 CPUs and 0 GPUs, which do not fit on the cluster"),
        ("search.ray.cpus_per_rank=4", "search.ray.ranks: found 1 x 4 CPUs"),
        ("search.ray.gpus_per_rank=0.5", "search.ray.ranks: found 1 x 1 CPUs and 0.5 GPUs"),
        ("search.ray.gpus_per_rank=1", "search.ray.ranks: found 1 x 1 CPUs and 1 GPUs"),
        ("search.ray.fisher_ranks=3", "search.ray.fisher_ranks: found 3 x 1 CPUs"),
        ("search.ray.placement=pac", 'did you mean "pack"'),
        ("fisher.samples=65", "fisher.samples: found 65; expected at most 64"),
    ],
)
def test_bad_input_is_one_line(folder: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(folder)
    output = folder / "bad"
    code = run(["search", str(folder / "toy.yaml"), "search.runner=ray", f"output={output}", override])
    said = capsys.readouterr().err
    assert code == 2, said
    assert re.search(message, said), said
    assert "Traceback" not in said
    assert len(re.findall("irdscale:", said)) == 1, said
    assert not (output / "ledger.jsonl").exists()
