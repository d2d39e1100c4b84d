"""Whole toy searches on Ray against the local runner: the same ledger, the same winner, whatever dies on the way."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray[tune]")

from irdscale.cli.command_line import run  # noqa: E402
from irdscale.config.loader import load_config  # noqa: E402
from irdscale.errors import InputError  # noqa: E402
from irdscale.search.ledger import read_ledger  # noqa: E402
from irdscale.search.ray_engine import ray_engine  # noqa: E402
from irdscale.search.ray_jobs import rungs  # noqa: E402
from irdscale.search.run import run_search  # noqa: E402
from irdscale.search.runner import WorkItem  # noqa: E402
from irdscale.tasks import load_task  # noqa: E402
from tests.search import calls, ray_toy  # noqa: E402
from tests.search.toy import essence, finished, write_config  # noqa: E402

SHORT = [*ray_toy.EVERY_STEP, "search.max_rounds=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def local(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The search on the local runner, and its output folder."""
    config = load_config(write_config(folder), [f"output={folder / 'local'}", *SHORT])
    return Path(config.output), run_search(config, progress=False)


@pytest.fixture
def on_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have searches of this process start a cluster of two processors, whose workers run `setup` first."""
    return ray_toy.two_processors(monkeypatch)


def faulty(raising: str, dying: str, folder: Path) -> Callable[[], None]:
    """A set-up of workers in which one candidate raises at its third step, and one is killed, once, at its fifth."""

    def setup() -> None:
        import logging

        from irdscale.cluster.worker import SupervisorClient

        loads = logging.FileHandler(folder / "loads")
        loads.setFormatter(logging.Formatter("%(process)d %(message)s"))
        logging.getLogger("irdscale.training.base_model").setLevel(logging.DEBUG)
        logging.getLogger("irdscale.training.base_model").addHandler(loads)
        real = SupervisorClient.say

        def say(self: SupervisorClient, now: bool = False, **facts: Any) -> None:
            real(self, now, **facts)
            step = facts.get("step")
            if self.name == raising and step == 3:
                raise ZeroDivisionError("of a kind\nthat has details")
            if self.name == dying and step is not None:
                with (folder / "steps").open("a") as file:
                    file.write(f"{step}\n")
                mark = folder / "died"
                if step == 5 and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

        SupervisorClient.say = say  # type: ignore[method-assign]

    return setup


@pytest.mark.parametrize("gpus", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_same_winner_and_ledger_as_local_though_workers_die(
    local: tuple[Path, dict[str, Any]], folder: Path, on_ray: Callable[..., None], tmp_path: Path, gpus: int
) -> None:
    (output, expected), ours = local, tmp_path / "ray"
    records = [r for r in read_ledger(output / "ledger.jsonl") if r["round"]]
    best = {(p["samples"], p["params"]) for p in [*expected["pareto"], *expected["path"]]}
    idle = next(r for r in records if (r["samples"], r["params"]) not in best)
    victim = next(r for r in records if (r["samples"], r["params"]) in best)
    on_ray(faulty(idle["key"], victim["key"], tmp_path), gpus=gpus)
    config = load_config(folder / "toy.yaml", [f"output={ours}", "search.runner=ray", *SHORT])
    result = run_search(config, progress=False)
    assert not ray.is_initialized()
    assert essence(result) == essence(expected)
    steps = [int(line) for line in (tmp_path / "steps").read_text().split()]
    assert steps == [0, 1, 2, 3, 4, 5, 4, *range(5, 25)], "goes on from the state saved last"
    found = read_ledger(ours / "ledger.jsonl")
    assert {r["key"]: r["error"] for r in found if r["status"] == "failed"} == {
        idle["key"]: "ZeroDivisionError: of a kind"
    }
    expected_metrics = finished(output)
    del expected_metrics[idle["key"]]
    assert finished(ours) == expected_metrics
    left = sorted(p.name for p in ours.iterdir())
    whole = ["adapter", "config.yaml", "fisher", "ledger.jsonl", "masks", "result.json", "tensorboard", "trainings"]
    assert left == whole
    curves = {p.name for p in (ours / "tensorboard").iterdir()}
    assert f"round0-16samples-{expected['path'][0]['params']}parameters-seed1" in curves
    assert not list(ours.rglob("*.pkl"))
    loads = (tmp_path / "loads").read_text().splitlines()
    processes = [line.split()[0] for line in loads]
    # Two at a time, and one in the place of the killed one; with a GPU, one at a time.
    assert 1 <= len(set(processes)) == len(processes) <= (2 if gpus else 4), loads
    assert all("load 1 of " in line for line in loads)


def test_light_calls_share_a_gpu_as_trials_do(folder: Path, on_ray: Callable[..., None], tmp_path: Path) -> None:
    """Of one GPU by name they have half each; what is not light waits until it has the whole."""
    on_ray(gpus=1)
    config = load_config(folder / "toy.yaml", ["search.runner=ray", "search.ray.gpus_per_rank=0.5"])
    with ray_engine(config, load_task(config), tmp_path, progress=False) as engine:
        both = [WorkItem(calls.meets, (place, 1 - place), light=True) for place in (0, 1)]
        assert engine.call_all([*both, WorkItem(calls.gpus)]) == [(0, config.fisher.seed), (1, config.fisher.seed), 1.0]


def test_a_local_search_goes_on_on_ray_and_back(local: tuple[Path, dict[str, Any]], folder: Path) -> None:
    """The runner does not make it another search; one that has ended starts no cluster."""
    config = load_config(folder / "toy.yaml", [f"output={local[0]}", "search.runner=ray", "search.ray.ranks=2", *SHORT])
    assert run_search(config, progress=False) == local[1]
    assert not ray.is_initialized()


def test_ray_under_a_launcher_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert run(["search", str(folder / "toy.yaml"), "search.runner=ray"]) == 2
    assert "search.runner: found ray and 2 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "RAY_ADDRESS: found 127.0.0.1:1, which does not answer"),
        ("ray://127.0.0.1:10001", "RAY_ADDRESS: found ray://127.0.0.1:10001; expected HOST:PORT"),
        ("auto", "RAY_ADDRESS: found auto, but no Ray cluster on this host"),
    ],
)
def test_an_address_where_no_cluster_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    config = load_config(folder / "toy.yaml", [f"output={folder / 'nowhere'}", "search.runner=ray"])
    with pytest.raises(InputError, match=re.escape(message)):
        run_search(config, progress=False)


def test_rungs_are_those_of_asha(folder: Path) -> None:
    config = load_config(write_config(folder), ["search.ray.early_stopping=true", "search.ray.grace_ratio=0.2"])
    assert rungs(config, 100) == {20, 40, 80}
    assert rungs(config, 3) == {1, 2}
    assert rungs(load_config(folder / "toy.yaml"), 100) == frozenset()
