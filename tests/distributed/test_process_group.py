"""Verbs under torchrun: the same masks as one process, one line for a mistake, no verb that all ranks would repeat."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from irdscale.cli.command_line import run
from irdscale.config.loader import load_config
from irdscale.config.schema import DistributedConfig
from irdscale.distributed import watchdog
from irdscale.distributed.process_group import _meet, in_process_group, launched, versions
from irdscale.errors import InputError, RunError
from irdscale.search.ledger import read_ledger
from irdscale.search.run import run_search
from irdscale.training.one_mask import run_fisher, run_train
from tests.helpers import step_of, tiny_model
from tests.spawned import Command, start_command_on_ranks
from tests.training_oracle import NO_DROPOUT, toy

ROOT, BIN = Path(__file__).parents[2], Path(sys.executable).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def started(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return started([*command, "--local-addr", "127.0.0.1", "-m", "irdscale", *arguments])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def place(rank: int, port: int) -> dict[str, str]:
    """What a launcher says in the environment of one of two ranks."""
    here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return {**here, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy task without dropout, whose streams are a rank's own."""
    return toy(tmp_path_factory.mktemp("launched") / "bert", "bert")


def test_fisher_on_two_ranks_writes_the_mask_of_one(config: Path, tmp_path: Path) -> None:
    changes = ["fisher.dtype=float64", "model.dtype=float64"]
    expected = run_fisher(load_config(config, [*changes, f"output={tmp_path / 'one'}"]), progress=False)
    done = torchrun(
        "fisher",
        str(config),
        *changes,
        "fisher.layout=sharded",
        f"output={tmp_path / 'two'}",
        "fisher.save_minutes=0",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert {k: found[k] for k in ("hash", "params", "sample_gradients")} == {
        k: expected[k] for k in ("hash", "params", "sample_gradients")
    }
    traces = [json.loads((tmp_path / name / "traces.json").read_text()) for name in ("one", "two")]
    assert traces[0]["row"] == traces[1]["row"]
    assert traces[1]["trace"] == pytest.approx(traces[0]["trace"], rel=1e-9)
    left = {path.name for path in (tmp_path / "two" / "fisher").iterdir()}
    assert left == {"mask.json", "run.json"}, "the state of the pass is gone, and what it was made by is told"


@needs_deepspeed
def test_search_on_two_ranks_under_zero_finds_the_same_winner(config: Path, tmp_path: Path) -> None:
    changes = ["fisher.dtype=float64", "search.max_rounds=1", "search.seeds=[0]", "train.steps=6"]
    expected = run_search(load_config(config, [*changes, f"output={tmp_path / 'one'}"]), progress=False)
    zero = f"train.deepspeed={ROOT / 'configs/deepspeed/zero3.json'}"
    ranks = start_command_on_ranks(["search", str(config), *changes, zero, f"output={tmp_path / 'two'}", "--json"], 2)
    ended = [rank.ended() for rank in ranks]
    assert [code for code, _, _ in ended] == [0, 0], ended
    found: dict[str, Any] = json.loads(ended[0][1])
    assert found["best"] == expected["best"]
    assert found["pareto"] == expected["pareto"]
    assert found["baseline"]["fish_random"]["mask"] == expected["baseline"]["fish_random"]["mask"]
    assert found["sample_gradients"] == expected["sample_gradients"]
    assert len(read_ledger(tmp_path / "two/ledger.jsonl")) == len(read_ledger(tmp_path / "one/ledger.jsonl"))
    assert (tmp_path / "two" / "report.html").exists()
    assert not (tmp_path / "two" / "candidates").exists()


@needs_deepspeed
def test_train_under_the_deepspeed_launcher_equals_one_process(config: Path, tmp_path: Path) -> None:
    expected = run_train(load_config(config, [f"output={tmp_path / 'one'}"]), progress=False)
    zero = f"train.deepspeed={ROOT / 'configs/deepspeed/zero2.json'}"
    command = [f"{BIN}/deepspeed", "--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    arguments = ["train", str(config), zero, f"output={tmp_path / 'two'}", "--json"]
    done = started([*command, "--module", "irdscale", *arguments])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{\n") : done.stdout.rindex("}") + 1])
    assert {k: found[k] for k in ("mask", "params", "head", "steps", "selection", "test")} == {
        k: expected[k] for k in ("mask", "params", "head", "steps", "selection", "test")
    }
    one, two = (load_file(tmp_path / name / "adapter/adapter.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=2e-6)
    assert not (tmp_path / "two" / "training").exists(), "the state of the training is gone"


@needs_deepspeed
def test_a_killed_rank_ends_the_other_and_the_training_goes_on(config: Path, tmp_path: Path) -> None:
    """The survivor names it; the same command then ends with the bits of a training that nobody killed."""
    zero = f"train.deepspeed={ROOT / 'configs/deepspeed/zero2.json'}"
    common = ["train", str(config), zero, "train.steps=60", "train.save_minutes=0"]

    def ranks(output: str) -> list[Command]:
        return start_command_on_ranks([*common, f"output={tmp_path / output}"], 2)

    ended = [rank.ended() for rank in ranks("whole")]
    assert [code for code, _, _ in ended] == [0, 0], ended
    killed = ranks("killed")
    try:
        state, deadline = tmp_path / "killed/training/state.json", time.monotonic() + 200
        while not (state.exists() and step_of(state) >= 5):
            assert time.monotonic() < deadline
            assert killed[1].process.is_alive()
            time.sleep(0.02)
        killed[1].process.kill()
        died = time.monotonic()
        code, _, errors = killed[0].ended(200)
        assert code == 1
        assert "rank 1 does not answer: killed, out of memory, or its machine is gone" in errors
        assert time.monotonic() - died < 60, "a machine under load is given four times as long"
    finally:
        for rank in killed:
            rank.process.kill()
            rank.process.join()
    done = step_of(state)
    assert 5 <= done < 60
    ended = [rank.ended() for rank in ranks("killed")]
    assert [code for code, _, _ in ended] == [0, 0], ended
    files = [tmp_path / name / "adapter/adapter.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_mistake_is_one_line_for_all_ranks(config: Path, tmp_path: Path) -> None:
    arguments = ["fisher", str(config), "fisher.include=[nothing_like_it]", f"output={tmp_path / 'x'}"]
    ended = [rank.ended() for rank in start_command_on_ranks(arguments, 2)]
    assert all(code != 0 for code, _, _ in ended)
    ours = [line for _, _, errors in ended for line in errors.splitlines() if line.startswith("irdscale: ")]
    assert len(ours) == 1
    assert "fisher.include=['nothing_like_it']" in ours[0]
    assert [output for _, output, _ in ended] == ["", ""]


@pytest.mark.parametrize("arguments", [["export", "CONFIG"]])
def test_verbs_for_one_process_refuse_a_launcher(
    arguments: list[str], config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run([str(config) if word == "CONFIG" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"irdscale: {arguments[0]}: found 2 ranks (WORLD_SIZE); expected one process: start it without a launcher\n"
    )


def test_launchers_variables_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert launched() == (0, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE: found 'two' in the environment; expected a number"):
        launched()


def meet(facts: list[dict[str, str]], world: int | None = None, seconds: float = 30.0) -> list[Exception | None]:
    """What came of each rank, a thread with facts of its own, that went to the meeting of `world`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # Rank 0 keeps the store, as under launchers that keep none; it must not leave before all know.
    stores = [dist.TCPStore("127.0.0.1", port, is_master=r == 0, wait_for_workers=False) for r in range(len(facts))]

    def come(rank: int) -> Exception | None:
        try:
            _meet(stores[rank], rank, world or len(facts), facts[rank], timedelta(seconds=seconds))
        except (InputError, RunError) as error:
            return error
        return None

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(come, range(len(facts))))


def test_ranks_with_the_same_software_meet() -> None:
    assert meet([versions()] * 3) == [None] * 3


@pytest.mark.parametrize("package", ["irdscale", "torch", "transformers", "deepspeed", "Python"])
def test_ranks_with_other_versions_are_refused_on_all(package: str) -> None:
    own = versions()
    problems = meet([own, own, {**own, package: "0.0.1"}])
    host = socket.gethostname()
    expected = f"rank 2 on {host} has another {package}: found 0.0.1; expected {own[package]}, as rank 0 on {host}"
    assert [str(problem) for problem in problems] == [expected] * 3
    assert all(isinstance(problem, InputError) for problem in problems)


def test_ranks_that_do_not_come_are_named() -> None:
    (problem,) = meet([versions()], world=3, seconds=0.6)
    assert isinstance(problem, RunError)
    assert str(problem) == "ranks 1, 2 did not come within 0.60 s: ended before, or the node is gone"


def test_a_rank_that_cannot_come_tells_the_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchrun whose two nodes have a rank each."""
    monkeypatch.setattr("irdscale.distributed.process_group._met", False)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        **place(1, store.port),
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    assert run(["train", "no-such.yaml"]) == 2
    with pytest.raises(InputError, match=r"rank 1 on \S+: no-such.yaml: cannot read the configuration: No such file"):
        _meet(store, 0, 2, versions(), timedelta(seconds=30))


def test_nccl_needs_gpus(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    assert run(["train", str(config), "distributed.backend=nccl", f"output={tmp_path / 'x'}"]) == 2
    assert capsys.readouterr().err == "irdscale: distributed.backend: found nccl and no GPU; expected auto or gloo\n"
    assert not (tmp_path / "x").exists()


def test_the_group_is_as_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "SILENT_S", watchdog.SILENT_S)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    settings = DistributedConfig(backend="gloo", timeout_minutes=3.0, silent_seconds=20.0)
    assert DistributedConfig().silent_seconds == watchdog.SILENT_S
    with in_process_group(settings, always=True):
        assert dist.get_backend() == "gloo"
        # There is no public way to ask.
        options = dist.group.WORLD._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(minutes=3)
        assert watchdog.SILENT_S == 20.0
    assert not dist.is_initialized()


def test_a_rank_that_met_others_leaves_without_taking_the_interpreter_down() -> None:
    """Its output and what it registered for its end are not lost; what would abort it is not reached."""
    code = """
import atexit
from irdscale.distributed import process_group
class Crash:
    def __del__(self):
        print("taken down")
left = Crash()
process_group.Left = left
atexit.register(print, "registered")
print("output")
process_group._met = {met}
process_group.leave(3)
"""
    for met, said in ((True, "output\nregistered\n"), (False, "output\nregistered\ntaken down\n")):
        done = subprocess.run([sys.executable, "-c", code.format(met=met)], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout, done.stderr) == (3, said, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("settings", "rank 1 has another train.steps: found 4; expected 3, as on rank 0"),
        ("model", r"rank 1 has another base: found \w+; expected \w+, as on rank 0"),
        ("data", r"rank 1 has another training data: found \w+; expected \w+, as on rank 0"),
    ],
)
def test_ranks_with_other_work_are_refused(config: Path, tmp_path: Path, what: str, problem: str) -> None:
    """A node with a folder of its own, which differs from the other's in one thing."""
    mask = run_fisher(load_config(config, [f"output={tmp_path / 'fisher'}"]), progress=False)["mask"]
    other = Path(shutil.copytree(config.parent, tmp_path / "other")) / config.name
    if what == "model":
        tiny_model("bert", other.parent / "model", seed=1, initializer_range=0.3, **NO_DROPOUT["bert"])
    if what == "data":
        lines = (other.parent / "data/train.jsonl").read_text().splitlines()
        (other.parent / "data/train.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    port, output = free_port(), f"output={tmp_path / 'out'}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "irdscale", "train", str(file), f"mask={mask}", f"train.steps={steps}", output],
            env={**ENVIRONMENT, **place(rank, port), "LOCAL_RANK": "0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file, steps in ((0, config, 3), (1, other, 4 if what == "settings" else 3))
    ]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert re.fullmatch(f"irdscale: {problem}\n", said[0])
    assert re.fullmatch(f"irdscale: rank 1: {problem}\n", said[1])
