"""Hostfiles of DeepSpeed: what is refused before any work, and runs over an ssh that only pretends to go elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from irdscale import hostfile
from irdscale.config_file import load_config
from irdscale.errors import InputError
from irdscale.hostfile import check_hosts, read_hostfile, run_on
from irdscale.launched import free_port
from irdscale.verbs import run_train
from tests.hosts import ROOT, environment, make_checkout, script
from tests.training_oracle import toy

# Knows the hosts one and two, which are this one. Like the true one it hands the command to a shell at the other end.
SSH = """
while [[ "$1" == -o ]]; do shift 2; done
host="$1"; shift
case "$host" in
  one|two) ;;
  slow) sleep 60 ;;
  *) echo "ssh: Could not resolve hostname $host: Name or service not known" >&2; exit 255 ;;
esac
export THIS_HOST="$host"
hostname() { echo "127.0.0.1 fd00::1"; }
export -f hostname
exec bash -c "$*"
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for ssh, first in PATH; returns its folder."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script(tools / "ssh", SSH)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    return tools


def test_the_shipped_hostfile_is_one() -> None:
    assert read_hostfile(ROOT / "launch/deepspeed_hostfile/hostfile") == {"node1": 8, "node2": 8}


def test_hosts_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# all\n\nzeta slots=2\n  me@10.0.0.2   slots=16  # the old one\n")
    assert list(read_hostfile(tmp_path / "hosts").items()) == [("zeta", 2), ("me@10.0.0.2", 16)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no hosts; expected lines such as 'node1 slots=8'"),
        ("# none\n", "found no hosts"),
        ("one\n", "1: found 'one'; expected 'HOST slots=N', such as 'node1 slots=8'"),
        ("one slots=8\ntwo slots=\n", "2: found 'two slots='; expected"),
        ("one slots=0\n", "1: found 'one slots=0'; expected"),
        ("one slots=8 max=9\n", "1: found 'one slots=8 max=9'; expected"),
        ("-oProxyCommand=x slots=8\n", "1: found '-oProxyCommand=x slots=8'; expected"),
        ("one slots=8\n\none slots=8\n", "3: one: given twice; expected one line a host"),
    ],
)
def test_lines_of_another_form_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(InputError) as caught:
        read_hostfile(tmp_path / "hosts")
    assert str(caught.value).startswith(f"{tmp_path / 'hosts'}:")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: cannot read the hostfile: No such file"):
        read_hostfile(tmp_path / "none")


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs deepspeed, and a C++ compiler for its communication on CPUs",
)


@pytest.mark.usefixtures("ssh")
def test_hosts_that_cannot_be_reached_are_named_with_what_ssh_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostfile, "_HAS_ALL", "")
    with pytest.raises(InputError) as caught:
        check_hosts(["nowhere", "one", "lost"])
    assert str(caught.value) == (
        "nowhere: cannot be reached: ssh: Could not resolve hostname nowhere: Name or service not known; "
        "expected ssh to it without a password (not well either: lost)"
    )
    monkeypatch.setattr(hostfile, "_CHECK_S", 0.2)
    with pytest.raises(InputError, match="slow: cannot be reached: no answer within 0 seconds; expected ssh to it"):
        check_hosts(["slow"])


@pytest.mark.usefixtures("ssh")
def test_hosts_without_this_installation_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostfile, "_HAS_ALL", "import irdscale, no_such_package")
    with pytest.raises(InputError) as caught:
        check_hosts(["one"])
    assert str(caught.value).startswith(
        "one: found no irdscale with deepspeed (ModuleNotFoundError: No module named 'no_s"
    )
    assert str(caught.value).endswith(f"expected {os.getcwd()} and {sys.executable}, as here")


@pytest.mark.usefixtures("ssh")
@needs_deepspeed
def test_the_first_host_says_where_to_meet() -> None:
    assert check_hosts(["one", "two"]) == "127.0.0.1"


@pytest.mark.usefixtures("ssh")
def test_a_command_runs_on_each_host_and_a_failure_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "it's")
    monkeypatch.setenv("HF_TOKEN", "secret")
    say = ["bash", "-c", 'echo "$THIS_HOST $1 $NCCL_DEBUG"', "bash"]
    assert run_on(["one", "two"], [[*say, "a  b"], [*say, "$c"]]) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["one a  b it's", "two $c it's"]
    monkeypatch.setattr(hostfile, "_LAST_WORDS_S", 0.5)
    # The other has children of its own, which must not stay.
    lasting = ["bash", "-c", f"sleep 1000 & echo $! >{shlex.quote(str(tmp_path / 'pid'))}; wait"]
    failing = ["bash", "-c", f"until [[ -s {shlex.quote(str(tmp_path / 'pid'))} ]]; do sleep 0.05; done; exit 3"]
    begun = time.monotonic()
    assert run_on(["one", "two"], [lasting, failing]) == 3
    assert time.monotonic() - begun < 30
    assert "two: failed with exit code 3" in capfd.readouterr().err
    gone(int((tmp_path / "pid").read_text()))


def gone(pid: int) -> None:
    """Wait until there is no such process."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, f"process {pid} stays"
        time.sleep(0.05)


def test_nothing_secret_goes_into_commands_that_others_can_read() -> None:
    names = (
        "NCCL_SOCKET_IFNAME",
        "GLOO_SOCKET_IFNAME",
        "OMP_NUM_THREADS",
        "HF_TOKEN",
        "HF_HUB_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
    )
    assert [name for name in names if hostfile._PASSED_ON.fullmatch(name)] == list(names[:3])


def launch(checkout: Path, ssh: Path, hosts: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    (checkout / "hosts").write_text(hosts)
    own = {"HOSTFILE": "hosts", "MASTER_PORT": str(free_port("127.0.0.1")), "OMP_NUM_THREADS": "1", **variables}
    given = environment(checkout, **own)
    return subprocess.Popen(
        ["bash", "launch/deepspeed_hostfile/run.sh", *arguments],
        cwd=checkout,
        env={**given, "PATH": f"{ssh}:{given['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_bad_hostfile_is_one_line_before_any_work(tmp_path: Path, ssh: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    for hosts, message in (
        ("one slots=x\n", "hosts:1: found 'one slots=x'"),
        ("away slots=1\n", "away: cannot be reached: ssh: "),
    ):
        job = launch(checkout, ssh, hosts, "train", "none.yaml")
        _, said = job.communicate(timeout=60)
        assert job.returncode == 2
        assert said.startswith("irdscale.hostfile: ")
        assert message in said
        assert said.count("\n") == 1
    assert (checkout / "installed").read_text() == "deepspeed\n" * 2


def result(job: subprocess.Popen[str]) -> Any:
    out, said = job.communicate(timeout=500)
    assert job.returncode == 0, said
    # The launcher speaks on stdout too.
    return json.loads(out[out.index("{\n") : out.rindex("}") + 1])


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_deepspeed_trains_on_two_hosts_and_goes_on_when_interrupted(tmp_path: Path, ssh: Path) -> None:
    """ZeRO-2 over two hosts comes to what one process does; Ctrl-C leaves nothing behind on any of them."""
    checkout, config = make_checkout(tmp_path / "checkout"), toy(tmp_path / "bert", "bert")
    hosts, zero = "one slots=1\ntwo slots=1\n", "train.deepspeed=./configs/deepspeed/zero2.json"
    common = ["train", str(config), "train.steps=40", "train.save_minutes=0"]
    expected = run_train(load_config(config, ["train.steps=40", f"output={tmp_path / 'one'}"]), progress=False)
    job = launch(checkout, ssh, hosts, *common, zero, f"output={tmp_path / 'two'}", "--json")
    state, deadline = tmp_path / "two/training/state.json", time.monotonic() + 400
    while not state.exists():
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    ranks = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and str(config) in command_of(p)]
    assert len(ranks) >= 2
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=120)
    assert job.returncode == 130
    for pid in ranks:
        if pid != job.pid:
            gone(pid)
    found = result(launch(checkout, ssh, hosts, *common, zero, f"output={tmp_path / 'two'}", "--json"))
    for name in ("mask", "params", "steps", "selection", "test"):
        assert found[name] == expected[name]


def command_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
