"""A node's part of a launch on several: what it is told, and what it says when others fail.

The slow ones launch real trainings and searches on two nodes: agents on the loopback, and namespaces with a cable.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from irdscale.distributed.multinode import own_address, start
from irdscale.distributed.process_group import free_port
from irdscale.errors import RunError
from tests.helpers import step_of
from tests.hosts import TWO_NODES, apart, environment, make_checkout, script
from tests.search.toy import essence, write_config
from tests.training_oracle import toy

LOST = re.compile(r"rank \d does not answer: killed, out of memory, or its machine is gone|HEAD: the connection to")


def test_a_node_is_known_by_its_address_on_the_way_to_the_head() -> None:
    assert own_address("127.0.0.1") == own_address("localhost") == "127.0.0.1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NODES": ""}, "torchrun_multinode.sh: NODES: missing; expected the number of nodes"),
        ({"NODES": "two"}, "torchrun_multinode.sh: NODES: found 'two'; expected a whole number of at least 1"),
        ({"RANKS": "0"}, "torchrun_multinode.sh: RANKS: found '0'; expected a whole number of at least 1"),
        ({"WAIT": "-1"}, "torchrun_multinode.sh: WAIT: found '-1'; expected a whole number of at least 1"),
        ({"HEAD": ""}, "torchrun_multinode.sh: HEAD: found ''; expected the first node's HOST or HOST:PORT"),
        (
            {"HEAD": "one:port"},
            "torchrun_multinode.sh: HEAD: found 'one:port'; expected the first node's HOST or HOST:PORT",
        ),
        (
            {"HEAD": "no-such-node.invalid"},
            r"irdscale.distributed.multinode: HEAD: found no-such-node.invalid: .+; expected a name or an IPv4 address",
        ),
    ],
)
def test_what_makes_no_meeting_is_one_line(checkout: Path, changes: dict[str, str], message: str) -> None:
    done = subprocess.run(
        ["bash", "launch/torchrun_multinode.sh", "train", "none.yaml"],
        cwd=checkout,
        env=environment(checkout, **{"NODES": "2", "HEAD": "127.0.0.1", "RANKS": "1", **changes}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(message, done.stderr.rstrip("\n")), done.stderr


def options(port: int, *conf: str) -> list[str]:
    """Of torchrun, for one of two nodes."""
    own = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=irdscale"]
    place = [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={','.join(('join_timeout=1,read_timeout=1', *conf))}"]
    return [*own, *place, "-m", "irdscale", "train", "none.yaml"]


def test_nodes_that_do_not_come_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    port = free_port("127.0.0.1")
    with pytest.raises(RunError, match=rf"fewer than 2 nodes \(NODES\) met at 127.0.0.1:{port} in time \(WAIT\)"):
        start(options(port))


def test_a_head_that_does_not_answer_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    port = free_port("127.0.0.1")
    begun = time.monotonic()
    with pytest.raises(RunError, match=rf"HEAD: the connection to 127.0.0.1:{port} failed: that node does not answer"):
        start(options(port, "is_host=0"))
    assert time.monotonic() - begun < 10


# Two nodes


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "checkout")


@pytest.fixture
def launches() -> Iterator[list[subprocess.Popen[str]]]:
    """Agents that were started; what is left of them is ended."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for agent in started:
        end(agent)
        agent.communicate()


def end(agent: subprocess.Popen[str]) -> None:
    """Kill a node: the agent and all its ranks, none of which can say anything."""
    if agent.poll() is None:
        for process in [*psutil.Process(agent.pid).children(recursive=True), agent]:
            process.send_signal(signal.SIGKILL)


def nodes(
    checkouts: tuple[Path, Path], port: int, launches: list[subprocess.Popen[str]], *arguments: str
) -> list[subprocess.Popen[str]]:
    """Two agents on the loopback, each with one rank, in their checkouts."""
    at = {"NODES": "2", "HEAD": f"127.0.0.1:{port}", "RANKS": "1", "WAIT": "120"}
    pair = [
        subprocess.Popen(
            ["bash", "launch/torchrun_multinode.sh", *arguments],
            cwd=checkout,
            env=environment(checkout, **at, NODE_RANK=str(node)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, checkout in enumerate(checkouts)
    ]
    launches += pair
    return pair


def ended(pair: list[subprocess.Popen[str]]) -> tuple[list[int], str, str]:
    """Exit codes, and all that was said on stdout and stderr."""
    said = [agent.communicate(timeout=300) for agent in pair]
    return [agent.returncode for agent in pair], said[0][0] + said[1][0], "\n".join(errors for _, errors in said)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_ends_the_other_and_the_same_command_goes_on(
    checkout: Path, tmp_path: Path, launches: list[subprocess.Popen[str]]
) -> None:
    """The result is that of a run that nobody disturbed, whichever node was lost."""
    config = toy(tmp_path / "bert", "bert")
    common = ["train", str(config), "train.steps=60", "train.save_minutes=0"]
    port = free_port("127.0.0.1")
    codes, _, errors = ended(nodes((checkout, checkout), port, launches, *common, f"output={tmp_path / 'whole'}"))
    assert codes == [0, 0], errors
    for lost in (1, 0):
        output = tmp_path / f"lost-{lost}"
        pair = nodes((checkout, checkout), port, launches, *common, f"output={output}")
        state, deadline = output / "training/state.json", time.monotonic() + 200
        while step_of(state) < 5:
            assert time.monotonic() < deadline
            assert pair[0].poll() is pair[1].poll() is None, ended(pair)
            time.sleep(0.02)
        end(pair[lost])
        died = time.monotonic()
        _, errors = pair[1 - lost].communicate(timeout=200)
        assert pair[1 - lost].returncode == 1, errors
        assert LOST.search(errors), errors
        assert time.monotonic() - died < 60, "a machine under load is given two times as long"
        assert 5 <= step_of(state) < 60
        codes, _, errors = ended(nodes((checkout, checkout), port, launches, *common, f"output={output}"))
        assert codes == [0, 0], errors
        files = [folder / "adapter/adapter.safetensors" for folder in (tmp_path / "whole", output)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_cannot_begin_says_so_on_both(
    checkout: Path, tmp_path: Path, launches: list[subprocess.Popen[str]]
) -> None:
    """Bad input on one alone; ranks that wait for it are told, and end at once."""
    (tmp_path / "other").mkdir()
    other = make_checkout(tmp_path / "other" / "checkout")
    toy(tmp_path / "bert", "bert")
    pair = nodes((checkout, other), free_port("127.0.0.1"), launches, "train", "../bert/toy.yaml", "output=../out")
    said = [agent.communicate(timeout=120)[1] for agent in pair]
    assert pair[1].returncode == 2
    assert "../bert/toy.yaml: cannot read the configuration" in said[1]
    assert pair[0].returncode == 2, said
    assert re.search(r"rank \d on \S+: \.\./bert/toy.yaml: cannot read the configuration", said[0]), said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_on_two_machines_finds_what_one_finds(checkout: Path, tmp_path: Path) -> None:
    """Two namespaces that reach each other by a cable alone, and do not know each other's names."""
    from irdscale.config.loader import load_config
    from irdscale.search.run import run_search

    # Without dropout, whose streams are a rank's own.
    config = toy(tmp_path / "bert", "bert")
    changes = ["fisher.dtype=float64", "search.max_rounds=1", "search.seeds=[0]", "train.steps=6"]
    launch = f"bash launch/torchrun_multinode.sh search {config} {' '.join(changes)} output={tmp_path}/two --json"
    text = f"""{TWO_NODES}
export NODES=2 HEAD=10.77.0.1 RANKS=1 WAIT=120
for node in one two; do
  ip netns exec $node unshare --uts --pid --fork --kill-child --mount-proc \
    bash -c 'hostname "$0"; {launch}' $node &
  nodes+=($!)
done
wait "${{nodes[0]}}"
wait "${{nodes[1]}}"
"""
    done, said = apart(checkout, text)
    assert done.returncode == 0, said
    expected = run_search(load_config(config, [*changes, f"output={tmp_path / 'one'}"]), progress=False)
    found = json.loads(done.stdout)
    for name in ("best", "pareto", "sample_gradients", "evaluations"):
        assert essence(found)[name] == essence(expected)[name]


SRUN = """
while [[ "$1" == --* ]]; do shift; done
code=0
for node in one two; do
  SLURM_NODEID=${#nodes[@]} ip netns exec $node \
    unshare --uts --pid --fork --kill-child --mount-proc bash -c 'hostname "$0"; "$@"; exit $?' $node "$@" &
  nodes+=($!)
done
for node in "${nodes[@]}"; do wait $node || code=$?; done
exit $code
"""


def slurm(checkout: Path, verb: str, *arguments: str) -> tuple[Any, str]:
    script(checkout / ".venv" / "bin" / "srun", SRUN)
    command = f"ip netns exec one bash launch/slurm_{verb}.sbatch {shlex.join(arguments)}"
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(checkout)}
    return apart(checkout, TWO_NODES + command, RANKS="1", WAIT="120", **job)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_trains_and_searches_on_two_nodes(checkout: Path, tmp_path: Path) -> None:
    write_config(tmp_path, search__max_rounds=1, search__seeds=[0], train__steps=4)
    done, said = slurm(checkout, "train", "../toy.yaml", "output=../trained", "--json")
    assert done.returncode == 0, said
    assert json.loads(done.stdout)["steps"] == 4
    # Once before the nodes, and once on each.
    assert (checkout / "installed").read_text() == "\n" * 3
    done, said = slurm(
        checkout, "search", "../toy.yaml", "output=../found", "search.min_samples=16", "search.min_ratio=0.05"
    )
    assert done.returncode == 0, said
    assert json.loads((tmp_path / "found" / "result.json").read_text())["evaluations"] == 1
    done, said = slurm(checkout, "train", "no-such.yaml")
    assert done.returncode == 2, said
    assert "no-such.yaml: cannot read the configuration" in done.stderr
