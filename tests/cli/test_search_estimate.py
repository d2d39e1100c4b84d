"""What `irdscale doctor` finds of a Ray cluster, and its estimate of a search."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import pytest

from irdscale.cli import doctor, search_estimate
from irdscale.config.loader import load_config
from irdscale.errors import InputError
from tests.search.toy import write_config


def test_a_cluster_that_does_not_answer_is_a_problem_at_once(monkeypatch):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    result = doctor.diagnose()
    assert result["ok"]
    assert result["ray"]["cluster"] is None
    why = f"RAY_ADDRESS: found {address}, which does not answer; expected a running Ray cluster"
    found = {"cannot": "search with search.runner=ray", "why": why, "blocks_search": False}
    assert result["problems"][-1] == found


def test_a_search_on_a_cluster_that_does_not_answer_is_bad_input(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    config = load_config(write_config(tmp_path), ["search.runner=ray"])
    with pytest.raises(InputError, match=r"^RAY_ADDRESS: found 127.0.0.1:1, which does not answer"):
        doctor.diagnose(config)


@pytest.fixture
def toy(tmp_path):
    return load_config(write_config(tmp_path, search__min_ratio=0.02, search__min_samples=8))


def test_the_estimate_of_a_search_measures_its_parts_and_writes_nothing(toy, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = doctor.diagnose(toy)
    assert sorted(tmp_path.rglob("*")) == before
    assert result["ok"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    found = result["search"]
    # From 16 samples to 8, and from 5 % to 2.5 %: the longest way takes one at a time.
    assert found["at_most"] == {
        "rounds": 2,
        "candidates": 3,
        "evaluations": (1 + 3 * 2 + 2) * 2,
        "steps": 24,
        "samples": 16,
        "rankings": 2,
        "selection": 32,
        "test": 32,
        "training_steps": 18 * 24,
    }
    assert found["ray"] is None
    assert found["local"]["at_once"] == 1
    assert found["local"]["seconds"] >= 18 * 24 * found["local"]["costs"]["step"]
    assert all(seconds >= 0 for seconds in found["local"]["costs"].values())
    assert found["local"]["costs"]["step"] > 0


def test_a_search_runs_no_more_than_is_estimated(toy):
    from irdscale.search.run import run_search

    most = doctor.diagnose(toy)["search"]["at_most"]
    result = run_search(toy, progress=False)
    evaluations = result["evaluations"] + 2 * len(toy.search.seeds)
    assert evaluations <= most["evaluations"]
    assert result["training_steps"] <= most["training_steps"]
    assert result["sample_gradients"] <= 2 * most["samples"]


def test_heads_are_warmed_up_as_often_as_is_estimated(toy, monkeypatch):
    """Before the pool's passes and before those of the random samples; each time the pool's losses take no gradient."""
    from irdscale.search.run import run_search
    from irdscale.training import head_warmup

    trained, fine_tune = [], head_warmup.fine_tune

    def count(model, task, config, *rest):
        trained.append(config.train.steps)
        fine_tune(model, task, config, *rest)

    monkeypatch.setattr(head_warmup, "fine_tune", count)
    changes = {"fisher": toy.fisher.model_copy(update={"head_warmup": 3})}
    run_search(toy.model_copy(update=changes), progress=False)
    assert trained == [3, 3]


class NoCluster:
    own = True


@pytest.fixture
def gpus_of_a_cluster(monkeypatch):
    """A cluster of one GPU by name, on which nothing runs; returns what fakes are made with."""
    pytest.importorskip("ray")
    from irdscale.cluster import connect
    from irdscale.plan import measured_costs
    from irdscale.plan.measured_costs import Costs, Size

    measured = Costs(0.0, 0.0, 0.0, 1.0, 0.1, 0.0), Size(1, 3, 12, 10, 16, 2, 8, 8)
    nodes = [{"id": "", "host": "one", "has": {"CPU": 8.0, "GPU": 1.0}}]
    monkeypatch.setattr(connect, "nodes", lambda: nodes)
    monkeypatch.setattr(connect, "connected", lambda: contextlib.nullcontext(NoCluster()))
    monkeypatch.setattr(connect, "check_nodes", lambda output: None)
    monkeypatch.setattr(
        search_estimate, "_connected_cluster", lambda: {"nodes": 1, "cpus": 8, "gpus": 1, "memory_gib": 1.0}
    )
    monkeypatch.setattr(search_estimate, "_on_cluster", lambda config, rank_group: measured)
    monkeypatch.setattr(measured_costs, "measured", lambda config: measured)
    return monkeypatch.setattr


def on_ray(toy, **ray):
    search = {**toy.search.model_dump(), "runner": "ray", "ray": ray}
    return type(toy).model_validate({**toy.model_dump(), "search": search})


@pytest.mark.parametrize("mps", [False, True])
def test_doctor_says_how_trials_share_a_gpu(toy, gpus_of_a_cluster, mps):
    from irdscale.cli.show_doctor import search_lines
    from irdscale.cluster.share import Card
    from irdscale.search import ray_engine

    gpus_of_a_cluster(ray_engine, "cards", lambda share: [Card("one", "H100", 80 * 2**30, mps)])
    result = doctor.diagnose(on_ray(toy, gpus_per_rank=0.25))
    assert result["ok"], result["problems"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    found = result["search"]["ray"]
    assert found["at_once"] == 4
    sharing = found["sharing"]
    assert (sharing["trials"], sharing["gpu_gib"], sharing["mps"], sharing["fits"]) == (4, 80.0, mps, True)
    # A toy of a few thousand parameters: what CUDA takes for a process is nearly all.
    assert 0.5 <= sharing["trial_gib"] < 0.6
    lines = list(search_lines(result["search"]))
    assert lines[-1] == sharing["said"]
    how = "by CUDA MPS;" if mps else "by time slices (start nvidia-cuda-mps-control -d on its node for MPS);"
    assert (
        f"search.ray.gpus_per_rank=0.25: up to 4 trials may share a GPU {how} a trial needs an estimated 0.5"
        in lines[-1]
    )
    auto = doctor.diagnose(on_ray(toy, gpus_per_rank="auto"))["search"]["ray"]
    assert (auto["at_once"], auto["sharing"]["share"]) == (8, 0.125)
    alone = doctor.diagnose(on_ray(toy, gpus_per_rank=1))["search"]["ray"]
    assert (alone["at_once"], alone["sharing"]) == (1, None)
    # Steps take as long for all, models are loaded side by side.
    assert alone["seconds"] > found["seconds"] > 12 * 10 * 0.1


def test_trials_that_do_not_fit_on_a_gpu_are_a_problem(toy, gpus_of_a_cluster):
    from irdscale.cluster.share import Card
    from irdscale.memory import gpu_sharing
    from irdscale.search import ray_engine

    gpus_of_a_cluster(ray_engine, "cards", lambda share: [Card("one", "L4", 22 * 2**30, False)])
    gpus_of_a_cluster(gpu_sharing, "trial_peak", lambda config, tokens: ("train", 7 * 2**30))
    result = doctor.diagnose(on_ray(toy, gpus_per_rank=0.25))
    assert not result["ok"]
    assert result["search"] is None
    assert result["problems"][-1] == {
        "cannot": "run trials that share a GPU",
        "why": "search.ray.gpus_per_rank: found 0.25, 4 trials of 7.50 GiB each on a GPU of 22.0 GiB (L4 of one); "
        "expected at least 0.5, for 2 trials",
        "blocks_search": True,
    }


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        pytest.param([], 2, marks=pytest.mark.slow),
        pytest.param(["search.ray.ranks=2"], 1, marks=pytest.mark.slow),
        (["search.ray.cpus_per_rank=3"], 0),
    ],
)
def test_on_a_cluster_doctor_says_what_fits_and_how_long_it_takes(tmp_path, changes, fits):
    """In a process of its own, with a cluster of its own: two processors of this machine."""
    pytest.importorskip("ray")
    config = write_config(tmp_path, search__max_rounds=1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    code = (
        "import ray, sys\n"
        "ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='ERROR')\n"
        "import subprocess, os\n"
        "os.environ['RAY_ADDRESS'] = ray.get_runtime_context().gcs_address\n"
        "sys.exit(subprocess.run([sys.executable, '-m', 'irdscale', 'doctor', *sys.argv[1:]]).returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config), "search.runner=ray", *changes, "--json"],
        env=environment,
        cwd=doctor.__file__.rsplit("/", 3)[0],
        capture_output=True,
        text=True,
        timeout=600,
    )
    result = json.loads(done.stdout)
    cluster = result["ray"]["cluster"]
    assert (cluster["nodes"], cluster["cpus"], cluster["gpus"], cluster["started_here"]) == (1, 2, 0, False)
    assert cluster["memory_gib"] > 0
    if fits == 0:
        assert done.returncode == 1
        assert result["search"] is None
        why = result["problems"][-1]
        assert why == {
            "cannot": "run a trial",
            "why": "1 x 3 CPUs and 0 GPUs (search.ray) do not fit on the cluster",
            "blocks_search": True,
        }
        return
    assert done.returncode == 0, done.stderr
    assert result["search"]["ray"]["at_once"] == fits
    assert result["search"]["ray"]["costs"]["step"] > 0
    assert result["search"]["ray"]["costs"] != result["search"]["local"]["costs"]
    assert not (tmp_path / "out").exists()
