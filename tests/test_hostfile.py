"""DeepSpeed with a hostfile: what is refused before any work, and a run over a stand-in for pdsh."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from irdscale.config.loader import load_config
from irdscale.distributed.process_group import free_port
from irdscale.training.one_mask import run_train
from tests.hosts import environment, make_checkout, script
from tests.training_oracle import toy

# Knows the hosts one and two, which are this one. Like the true one it hands the command to a shell at the other end.
SSH = """
while [[ "$1" == -* ]]; do [[ "$1" != -o ]] || shift; shift; done
host="$1"; shift
case "$host" in
  one|two) ;;
  *) echo "ssh: Could not resolve hostname $host: Name or service not known" >&2; exit 255 ;;
esac
hostname() { echo "127.0.0.1 fd00::1"; }
export -f hostname
exec bash -c "$*"
"""
# Starts the command on all hosts, with %n for a host's number; the largest exit code.
PDSH = """
echo "$*" >>"$(dirname "$0")/calls"
while [[ "$1" == -* ]]; do
  [[ "$1" != -w ]] || IFS=, read -ra hosts <<<"$2"
  [[ "$1" != -[wf] ]] || shift
  shift
done
command="$*" code=0
for n in "${!hosts[@]}"; do ssh "${hosts[$n]}" "${command//%n/$n}" & started+=($!); done
for pid in "${started[@]}"; do wait "$pid" || code=$((code > $? ? code : $?)); done
exit "$code"
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Stand-ins for ssh and pdsh."""
    folder = tmp_path / "tools"
    folder.mkdir()
    script(folder / "ssh", SSH)
    script(folder / "pdsh", PDSH)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = make_checkout(tmp_path / "checkout", deepspeed="deepspeed.launcher.runner")
    (folder / ".venv/bin/activate").touch()
    return folder


def launch(checkout: Path, tools: Path, hosts: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the launch script with a hostfile."""
    (checkout / "hosts").write_text(hosts)
    own = {"HOSTFILE": "hosts", "MASTER_PORT": str(free_port("127.0.0.1")), "OMP_NUM_THREADS": "1", **variables}
    given = environment(checkout, **own)
    done = subprocess.run(
        ["bash", "launch/deepspeed_hostfile/run.sh", *arguments],
        cwd=checkout,
        env={**given, "PATH": f"{tools}:{given['PATH']}"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("", "hosts: found no hosts; expected lines such as 'node1 slots=8'"),
        ("# none\n", "hosts: found no hosts; expected lines such as 'node1 slots=8'"),
        ("one\n", "hosts:1:one: expected 'HOST slots=N', such as 'node1 slots=8'"),
        (
            "# all\n\none slots=8\ntwo slots=x\n",
            "hosts:4:two slots=x: expected 'HOST slots=N', such as 'node1 slots=8'",
        ),
        ("one slots=0\n", "hosts:1:one slots=0: expected 'HOST slots=N', such as 'node1 slots=8'"),
        (
            "-oProxyCommand=x slots=8\n",
            "hosts:1:-oProxyCommand=x slots=8: expected 'HOST slots=N', such as 'node1 slots=8'",
        ),
        ("one slots=8\n\none slots=8\n", "hosts: one: given twice; expected one line a host"),
        (
            "one slots=1\naway slots=1  # the old one\n",
            "away: cannot be reached: ssh: Could not resolve hostname away: Name or service not known; "
            "expected ssh to it without a password",
        ),
    ],
)
def test_a_bad_hostfile_is_one_line_before_any_work(checkout: Path, tools: Path, hosts: str, message: str) -> None:
    assert launch(checkout, tools, hosts, "train", "none.yaml") == (2, "", f"run.sh: {message}\n")
    assert (checkout / "installed").read_text() == "deepspeed\n"
    assert not (tools / "calls").exists()


def test_a_hostfile_that_is_not_there_is_named(checkout: Path, tools: Path) -> None:
    found = launch(checkout, tools, "", "train", "none.yaml", HOSTFILE="none")
    assert found == (2, "", "run.sh: none: cannot read the hostfile\n")


def test_the_shipped_hostfile_names_hosts_to_change(checkout: Path, tools: Path) -> None:
    code, _, said = launch(checkout, tools, "", "train", "none.yaml", HOSTFILE="")
    assert code == 2
    assert {line.split(" cannot be reached")[0] for line in said.splitlines()} == {"run.sh: node1:", "run.sh: node2:"}


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_deepspeed_trains_on_two_hosts(checkout: Path, tools: Path, tmp_path: Path) -> None:
    """ZeRO-2 over two hosts comes to what one process does, and bad input on them ends with its code."""
    config = toy(tmp_path / "bert", "bert")
    hosts, zero = "one slots=1\ntwo slots=1\n", "train.deepspeed=./configs/deepspeed/zero2.json"
    common = ["train", str(config), "train.steps=4"]
    expected = run_train(load_config(config, ["train.steps=4", f"output={tmp_path / 'one'}"]), progress=False)
    code, out, said = launch(checkout, tools, hosts, *common, zero, f"output={tmp_path / 'two'}", "--json")
    assert code == 0, said
    # The launcher speaks on stdout too.
    found: dict[str, Any] = json.loads(out[out.index("{\n") : out.rindex("}") + 1])
    for name in ("mask", "params", "steps", "selection", "test"):
        assert found[name] == expected[name]
    code, _, said = launch(checkout, tools, hosts, "train", "none.yaml")
    assert code == 2
    assert "none.yaml: cannot read the configuration" in said
