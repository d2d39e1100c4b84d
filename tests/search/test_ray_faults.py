"""Searches on Ray through real disasters: killed drivers, lost nodes, interrupts, hung trials. All slow."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

ray = pytest.importorskip("ray", reason="needs ray[tune]")

from irdscale.config.loader import load_config  # noqa: E402
from irdscale.search.ledger import read_ledger  # noqa: E402
from irdscale.search.run import run_search  # noqa: E402
from tests.search.ray_toy import (  # noqa: E402
    EVERY_STEP,
    below,
    command,
    ends_well,
    environment,
    kill,
    named,
    result_of,
    saved_steps,
    wait_for,
)
from tests.search.toy import essence, finished, write_config  # noqa: E402
from tests.training_oracle import toy as plain_toy  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
RANK = "ray::run_rank"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def local(toy: Path) -> tuple[Path, dict[str, Any]]:
    """The undisturbed search on the local runner, and its output folder."""
    config = load_config(toy, [f"output={toy.parent / 'local'}", *EVERY_STEP])
    return Path(config.output), run_search(config, progress=False)


def same(output: Path, local: tuple[Path, dict[str, Any]]) -> None:
    assert essence(result_of(output)) == essence(local[1])
    assert finished(output) == finished(local[0])


def in_training(output: Path, done: int) -> bool:
    """Whether so many evaluations have ended, and a trial is in the middle of its training."""
    return len(finished(output)) >= done and any(3 <= step <= 20 for step in saved_steps(output).values())


def test_a_driver_killed_in_a_trial_and_in_a_round(toy: Path, local: tuple[Path, dict[str, Any]]) -> None:
    output, seen = toy.parent / "killed", dict[str, float]()
    # In the first trials; in a round of six of which some have ended; in one of four.
    for done in (0, 4, 9):
        with command(toy, output) as process:
            wait_for(lambda done=done, process=process: in_training(output, done) or process.poll() is not None)
            working = [p for name in (RANK, "ray::_Trial", "ray::Supervisor") for p in named(below(process.pid), name)]
            assert process.poll() is None
            process.kill()
            process.wait()
            steps = saved_steps(output)
            # Nothing of a dead search works on.
            assert len(working) >= 2
            assert not psutil.wait_procs(working, timeout=60)[1]
        now = finished(output)
        assert seen.items() <= now.items()
        assert steps
        seen = now
    with command(toy, output) as process:
        said = ends_well(process)
    assert "resuming: " in said
    same(output, local)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupt_saves_the_state_and_the_next_run_goes_on(toy: Path, ending: signal.Signals) -> None:
    """With a state saved only when asked: what is found on disk, the interrupt has saved.

    A terminal sends SIGINT to all of the group, a scheduler SIGTERM to the search.
    """
    output = toy.parent / f"interrupted-{ending.name}"
    overrides = ["train.save_minutes=1000", "train.steps=400"]
    with command(toy, output, *overrides) as process:
        wait_for(lambda: named(below(process.pid), RANK))
        wait_for(lambda: (output / "tensorboard").is_dir())
        time.sleep(4)
        children = below(process.pid)
        (os.killpg if ending == signal.SIGINT else os.kill)(process.pid, ending)
        started = time.monotonic()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1] == "irdscale: interrupted; the same command goes on from there"
    assert time.monotonic() - started < 45
    psutil.wait_procs(children, timeout=30)
    assert not [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
    assert saved_steps(output)
    before = finished(output)
    # A state belongs to one training: with fewer steps it would be another search.
    with command(toy, output, *overrides, "search.ray.concurrent=2") as process:
        wait_for(lambda: len(finished(output)) > len(before))
        process.kill()


def test_candidates_of_two_ranks_under_zero_and_one_rank_is_killed(tmp_path: Path) -> None:
    """Without dropout, whose streams are a rank's own; the masks in float64, whose sums do not depend on the ranks."""
    still, output = plain_toy(tmp_path / "bert", "bert"), tmp_path / "ranks"
    same = ["fisher.dtype=float64", "search.seeds=[0]", "search.max_rounds=1", "train.steps=12"]
    zero = f"train.deepspeed={Path(__file__).parents[2] / 'configs/deepspeed/zero2.json'}"
    with command(still, output, *same, zero, "search.ray.ranks=2") as process:
        wait_for(lambda: any(step >= 3 for step in saved_steps(output).values()), 300)
        ranks = named(below(process.pid), RANK)
        assert len(ranks) == 2
        kill(random.Random(0).choice(ranks))
        ends_well(process, 900)
    expected = run_search(load_config(still, [*same, f"output={tmp_path / 'one'}", *EVERY_STEP]), progress=False)
    found = result_of(output)
    assert found["best"]["mask"] == expected["best"]["mask"]
    assert [p["mask"] for p in found["pareto"]] == [p["mask"] for p in expected["pareto"]]
    assert found["path"] == expected["path"]
    assert {r["status"] for r in read_ledger(output / "ledger.jsonl")} == {"ok"}


@contextmanager
def cluster(**head: Any) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in environment().items():
            patch.setenv(name, value)
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield made
        finally:
            made.shutdown()


def test_a_node_is_lost_and_another_joins(toy: Path, local: tuple[Path, dict[str, Any]]) -> None:
    output = toy.parent / "nodes"
    with cluster(num_cpus=0) as made:
        first = made.add_node(num_cpus=2)
        made.wait_for_nodes()
        with command(toy, output, RAY_ADDRESS=made.address) as process:
            wait_for(lambda: in_training(output, 3))
            made.remove_node(first, allow_graceful=False)
            lost = finished(output)
            time.sleep(3)
            made.add_node(num_cpus=2)
            ends_well(process)
    assert lost.items() <= finished(output).items()
    same(output, local)


@contextmanager
def daemon(*arguments: str, wrapped: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A `ray start` that lives as long as the body, and all that it starts."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *arguments]
    if wrapped is not None:
        quoted = " ".join(start)
        start = ["unshare", "--mount", "sh", "-c", f"{wrapped} && exec {quoted}"]
    process = subprocess.Popen(
        start, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        children = below(process.pid)
        for child in [*children, psutil.Process(process.pid)]:
            kill(child)
        process.wait()


def free_port() -> int:
    # Below those that workers take.
    for port in range(random.randrange(6400, 9000), 10000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError


@contextmanager
def two_daemons(folder: Path, wrapped: str | None = None) -> Iterator[str]:
    """A head that computes nothing and a node of two processors, as two real `ray start`."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    # Short, for sockets have names of at most 107 characters.
    scratch = Path("/tmp") / f"rayt{port}"
    try:
        with ExitStack() as stack:
            stack.enter_context(daemon(*head, f"--temp-dir={scratch}"))
            wait_for(lambda: not refuses(port), 60)
            time.sleep(5)
            node = [f"--address={address}", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
            stack.enter_context(daemon(*node, wrapped=wrapped))
            time.sleep(8)
            yield address
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_two_real_daemons(toy: Path, local: tuple[Path, dict[str, Any]]) -> None:
    output = toy.parent / "daemons"
    with two_daemons(toy.parent) as address, command(toy, output, RAY_ADDRESS=address) as process:
        ends_well(process)
    same(output, local)


def test_storage_that_is_not_shared_is_refused_before_the_first_trial(toy: Path) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("needs the right to make a mount namespace, for a node with a folder of its own")
    output = toy.parent / "apart" / "out"
    output.parent.mkdir()
    mount = f"mount -t tmpfs none {output.parent}"
    with (
        two_daemons(toy.parent, wrapped=mount) as address,
        command(toy, output, RAY_ADDRESS=address) as process,
    ):
        _, said = process.communicate(timeout=180)
    assert process.returncode == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("irdscale: ")]
    assert line.startswith("irdscale: output: node ")
    assert "expected a folder that all nodes share" in line
    assert not (output / "ledger.jsonl").exists()
    assert not (output / "masks").exists()


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_early_stopping_takes_fewer_steps(toy: Path, local: tuple[Path, dict[str, Any]], stage: int | None) -> None:
    """Measured in the middle of a training, by one rank or by two under ZeRO; the same numbers at the end."""
    output = toy.parent / f"asha{stage}"
    overrides = ["search.ray.early_stopping=true", "search.max_rounds=1"]
    if stage is not None:
        zero = toy.parent / f"zero{stage}.json"
        shutil.copy(Path(__file__).parents[2] / f"configs/deepspeed/zero{stage}.json", zero)
        overrides += ["search.ray.ranks=2", "search.seeds=[0]", f"train.deepspeed={zero}"]
    with command(toy, output, *overrides) as process:
        ends_well(process, 900)
    records = read_ledger(output / "ledger.jsonl")
    stopped = [r for r in records if r["status"] == "failed"]
    assert stopped
    assert all(r["error"].startswith(f"stopped early at step {r['stopped_at']},") for r in stopped), stopped
    assert all(r["round"] == 1 for r in stopped), stopped
    if stage is None:
        expected = finished(local[0])
        both = [r for r in records if r["status"] == "ok" and r["key"] in expected]
        assert len(both) >= 3
        assert all(r["metric"] == expected[r["key"]] for r in both)
    first = {(r["samples"], r["params"]): r["status"] for r in records if r["round"] == 1 and r["seed"] == 0}
    assert "ok" in first.values()
    whole = {pair for pair, status in first.items() if status == "ok"}
    rest = [r for r in records if r["round"] == 1 and (r["samples"], r["params"]) in whole]
    assert all(r["status"] == "ok" for r in rest), "the other seeds are not judged by themselves"


def test_twenty_kills_at_random_moments(toy: Path, local: tuple[Path, dict[str, Any]]) -> None:
    """Ranks, trials, the supervisor and the driver, as they come."""
    output, generator, kills = toy.parent / "soak", random.Random(6), dict[str, int]()
    while True:
        with command(toy, output, "search.ray.max_failures=20") as process:
            while process.poll() is None:
                deadline = time.monotonic() + (generator.uniform(1, 12) if sum(kills.values()) < 20 else 1000)
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                if process.poll() is not None:
                    break
                what = generator.choices([RANK, "ray::ResourceTrainable", "ray::Supervisor", "driver"], [6, 3, 1, 2])[0]
                if what == "driver":
                    process.kill()
                    process.wait()
                    kills[what] = kills.get(what, 0) + 1
                    break
                victims = named(below(process.pid), what)
                if victims:
                    kill(generator.choice(victims))
                    kills[what] = kills.get(what, 0) + 1
            _, said = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said[-3000:]
        time.sleep(4)
    print(json.dumps(kills))
    assert sum(kills.values()) >= 20
    assert kills.keys() >= {RANK, "driver"}
    records = read_ledger(output / "ledger.jsonl")
    assert {r["status"] for r in records} == {"ok"}
    assert len({r["key"] for r in records}) == len(records)
    same(output, local)
