import contextlib
import dataclasses
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import types

import pytest

from irdscale.cli import doctor
from irdscale.config.loader import load_config
from irdscale.errors import InputError
from tests.search.toy import write_config


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    """Another test's cluster is not looked for."""
    monkeypatch.setattr(doctor, "_found", no_cluster)


@contextlib.contextmanager
def no_cluster(problems):
    yield None


FOUND = doctor._found


@pytest.fixture(scope="module")
def healthy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_found", no_cluster)
        return doctor.diagnose()


def test_this_machine_can_search(healthy):
    assert healthy["ok"], healthy["problems"]
    assert healthy["torch"]["devices"]["cpu"] == {"float32": True, "float64": True, "bfloat16": True}
    assert healthy["torch"]["threads"] >= 1
    assert healthy["free_memory_gib"] > 0
    assert healthy["free_disk_gib"] > 0


def test_result_is_json(healthy):
    assert json.loads(json.dumps(healthy, allow_nan=False)) == healthy


def test_runtime_packages_are_listed_and_development_tools_are_not(healthy):
    assert {"torch", "transformers", "datasets", "pydantic", "peft"} <= set(healthy["packages"])
    assert not {"pytest", "ruff", "mypy"} & set(healthy["packages"])
    assert healthy["packages"]["numpy"]["found"] == importlib.metadata.version("numpy")


def test_missing_and_old_packages_are_problems_that_name_them(monkeypatch):
    monkeypatch.setattr(
        doctor,
        "requirements",
        lambda: ["torch>=2.8", "no-such-package>=1", "numpy>=999", "nor-this>=2; extra == 'bench'"],
    )
    result = doctor.diagnose()
    assert not result["ok"]
    assert result["packages"]["no-such-package"] == {"found": None, "needs": ">=1", "ok": False}
    blocking = [problem["why"] for problem in result["problems"] if problem["blocks_search"]]
    version = importlib.metadata.version("numpy")
    assert blocking == [
        "no-such-package is missing; it needs no-such-package>=1",
        f"numpy is {version}; it needs numpy>=999",
    ]
    optional = [problem for problem in result["problems"] if problem["cannot"] == "run irdscale bench"]
    assert [problem["why"] for problem in optional] == ["nor-this is missing; it needs nor-this>=2"]


def test_without_the_minilm_package_only_the_quickstart_is_out(monkeypatch):
    monkeypatch.setattr(doctor, "MINILM", "no_such_module")
    result = doctor.diagnose()
    assert result["ok"]
    assert result["minilm"] is None
    cannot = [problem["cannot"] for problem in result["problems"]]
    assert [what for what in cannot if "deepspeed" not in what and "ray" not in what] == ["run configs/quickstart.yaml"]


def test_what_deepspeed_lacks_is_said_and_blocks_no_search(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: None)
    monkeypatch.setattr(doctor, "_packages", lambda problems: {"torch": {"found": None}})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19")
    result = doctor.diagnose()
    assert result["ok"]
    assert result["deepspeed"] == "0.19"
    assert [p["why"] for p in result["problems"]][-1] == "without GPUs, deepspeed needs a C++ compiler (g++)"

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    result = doctor.diagnose()
    assert result["deepspeed"] is None
    assert "deepspeed is missing; run: pip install" in result["problems"][-2]["why"]
    assert result["problems"][-1]["why"] == "ray is missing; run: pip install 'irdscale[ray]'"
    assert result["ray"] == {"version": None, "cluster": None}


def test_requirements_fall_back_to_the_checkout(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    found = doctor.requirements()
    assert any(need.startswith("torch>=") for need in found)
    assert "peft>=0.17; extra == 'bench'" in found


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("0", False), (None, False)])
def test_hub_state(monkeypatch, value, offline):
    if value is None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert doctor._offline() is offline


def test_a_type_that_does_not_work_is_a_problem():
    import torch

    class Broken:
        float64 = torch.float64
        float32 = torch.float32
        bfloat16 = torch.bfloat16

        @staticmethod
        def ones(*shape, dtype, **kwargs):
            if dtype is torch.bfloat16:
                raise RuntimeError("not implemented for 'BFloat16'\nmore")
            return torch.ones(*shape, dtype=dtype, **kwargs)

    problems = []
    assert doctor._device(Broken, "cpu", problems) == {"float32": True, "float64": True, "bfloat16": False}
    why = "bfloat16 matrix products fail on cpu: not implemented for 'BFloat16'"
    assert problems == [{"cannot": "use model.dtype=bfloat16", "why": why, "blocks_search": False}]


def test_a_gpu_is_listed_with_its_memory():
    import torch

    cuda = types.SimpleNamespace(
        mem_get_info=lambda device: (3 * 2**30, 8 * 2**30), get_device_name=lambda device: f"Card of {device}"
    )
    fake = types.SimpleNamespace(float32=torch.float32, float64=torch.float64, bfloat16=torch.bfloat16, cuda=cuda)
    fake.ones = lambda *shape, device, **kwargs: torch.ones(*shape, **kwargs)
    problems = []
    facts = doctor._device(fake, "cuda:1", problems)
    assert facts["name"] == "Card of cuda:1"
    assert (facts["free_memory_gib"], facts["memory_gib"]) == (3.0, 8.0)
    assert problems == []


# Ray, and how long a search takes


def test_a_cluster_that_does_not_answer_is_a_problem_at_once(monkeypatch):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(doctor, "_found", FOUND)
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


def test_the_time_of_a_search_is_the_sum_of_its_parts(toy):
    from irdscale.plan.measured_costs import Costs, Size, search_seconds

    splits = {"samples": 100, "selection": 20, "test": 30}
    size = Size(rounds=2, candidates=3, evaluations=18, steps=10, rankings=3, **splits)
    costs = Costs(trace=1.0, gradient=100.0, ranking=1e4, begin=1e6, step=1e9, prediction=1e13, load=10.0)
    # Waves of (start, two rounds, baselines) at two seeds: 2 + 6 + 6 + 4 one by one, 1 + 2 + 2 + 1 four at once.
    for at_once, ranks, waves in ((1, 1, 18), (4, 1, 6), (4, 2, 6)):
        only = {
            "trace": 100 / ranks,
            "gradient": 2 * 100 * 100 / ranks,
            "ranking": 4e4,
            "begin": (waves + 6) * 1e6,
            "step": waves * 10 * 1e9,
            "prediction": (100 / ranks + waves * 20 + 6 * 30) * 1e13,
            # The passes' process, and those of the evaluations where they are others.
            "load": 10.0 if at_once == 1 else 20.0,
        }
        for name, expected in only.items():
            zero = {field.name: 0.0 for field in dataclasses.fields(costs)}
            part = Costs(**zero | {name: getattr(costs, name)})
            assert search_seconds(toy, part, size, at_once, ranks) == pytest.approx(expected)
        total = search_seconds(toy, costs, size, at_once, ranks)
        assert total == pytest.approx(sum(only.values()), rel=1e-12)
    warm = toy.model_copy(update={"fisher": toy.fisher.model_copy(update={"head_warmup": 7})})
    for at_once, ranks in ((1, 1), (4, 2)):
        head = search_seconds(warm, costs, size, at_once, ranks) - search_seconds(toy, costs, size, at_once, ranks)
        assert head == pytest.approx(2 * (costs.begin + 7 * costs.step), rel=1e-4)
    shuffled = toy.model_copy(update={"search": toy.search.model_copy(update={"direction": "random"})})
    assert search_seconds(toy, costs, size) - search_seconds(shuffled, costs, size) == pytest.approx(100.0, rel=0.5)
    more = dataclasses.replace(size, rankings=7)
    assert search_seconds(toy, costs, more) - search_seconds(toy, costs, size) == pytest.approx(4e4, abs=20)


def test_the_time_of_evaluations_that_share_a_gpu(toy):
    from irdscale.plan.measured_costs import Costs, Size, search_seconds

    splits = {"samples": 100, "selection": 20, "test": 30}
    size = Size(rounds=2, candidates=3, evaluations=18, steps=10, rankings=3, **splits)
    steps = Costs(trace=0.0, gradient=0.0, ranking=0.0, begin=0.0, step=0.1, prediction=0.0)
    begins = Costs(trace=0.0, gradient=0.0, ranking=0.0, begin=1.0, step=0.0, prediction=0.0)
    # Of 2, 6, 6 and 4 evaluations four at once share one GPU: no step is saved, but the waiting for models is.
    assert search_seconds(toy, steps, size, 4, 1, 4) == search_seconds(toy, steps, size) == pytest.approx(18)
    assert search_seconds(toy, begins, size, 4, 1, 4) == search_seconds(toy, begins, size, 4) == 6 + 6
    # Of two GPUs with four each, the first is filled before the second.
    assert search_seconds(toy, steps, size, 8, 1, 4) == pytest.approx(2 + 4 + 4 + 4)


class NoCluster:
    own = True


@pytest.fixture
def gpus_of_a_cluster(monkeypatch):
    """A cluster of one GPU by name, on which nothing runs; returns what fakes are made with."""
    import contextlib

    pytest.importorskip("ray")
    from irdscale.cluster import connect
    from irdscale.plan import measured_costs
    from irdscale.plan.measured_costs import Costs, Size

    measured = Costs(0.0, 0.0, 0.0, 1.0, 0.1, 0.0), Size(1, 3, 12, 10, 16, 2, 8, 8)
    nodes = [{"id": "", "host": "one", "has": {"CPU": 8.0, "GPU": 1.0}}]
    monkeypatch.setattr(connect, "nodes", lambda: nodes)
    monkeypatch.setattr(connect, "connected", lambda: contextlib.nullcontext(NoCluster()))
    monkeypatch.setattr(connect, "check_nodes", lambda output: None)
    monkeypatch.setattr(doctor, "_described", lambda: {"nodes": 1, "cpus": 8, "gpus": 1, "memory_gib": 1.0})
    monkeypatch.setattr(doctor, "_on_cluster", lambda config, rank_group: measured)
    monkeypatch.setattr(measured_costs, "measured", lambda config: measured)
    return monkeypatch.setattr


def on_ray(toy, **ray):
    search = {**toy.search.model_dump(), "runner": "ray", "ray": ray}
    return type(toy).model_validate({**toy.model_dump(), "search": search})


@pytest.mark.parametrize("mps", [False, True])
def test_doctor_says_how_trials_share_a_gpu(toy, gpus_of_a_cluster, mps):
    from irdscale.cli.console import _said_of_search
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
    lines = list(_said_of_search(result["search"]))
    assert lines[-1] == sharing["said"]
    how = "by CUDA MPS;" if mps else "by time slices (start nvidia-cuda-mps-control -d on its node for MPS);"
    assert (
        f"search.ray.gpus_per_rank=0.25: up to 4 trial(s) share a GPU {how} a trial needs an estimated 0.5" in lines[-1]
    )
    whole = doctor.diagnose(on_ray(toy, gpus_per_rank=1))["search"]["ray"]
    assert (whole["at_once"], whole["sharing"]) == (1, None)
    # Steps take as long for all, models are loaded side by side.
    assert whole["seconds"] > found["seconds"] > 12 * 10 * 0.1


def test_the_longest_sample_is_of_what_is_trained_on_and_of_selection(toy):
    from irdscale.tasks import load_task

    task = load_task(toy)
    assert task.longest == max(len(ids) for split in (task.train, task.selection) for ids in split["input_ids"])


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
        "why": "search.ray.gpus_per_rank: found 0.25, 4 trials of 7.5 GiB each on a GPU of 22.0 GiB (L4 of one); "
        "expected at least 0.5, for 2 trials",
        "blocks_search": True,
    }


def test_ranks_that_cannot_share_a_batch_are_refused(toy):
    from irdscale.plan.measured_costs import measured

    with pytest.raises(InputError, match=r"^train.batch_size: found 8; expected a multiple of 3"):
        measured(toy, ranks=3)


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
