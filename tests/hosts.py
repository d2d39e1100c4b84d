"""Hosts for launch scripts to run on: a checkout that has nothing to install, and network namespaces for machines."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# A host of its own: no process, port, mount or secret of this one is seen or touched.
APART = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--net"]
TWO_NODES = """
mount -t tmpfs tmpfs /run
for node in one two; do ip netns add $node; ip -n $node link set lo up; done
ip link add net0 netns one type veth peer name net0 netns two
ip -n one addr add 10.77.0.1/24 dev net0; ip -n one link set net0 up
ip -n two addr add 10.77.0.2/24 dev net0; ip -n two link set net0 up
"""


def script(path: Path, text: str) -> None:
    """Write a program in bash."""
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def make_checkout(folder: Path, **programs: str) -> Path:
    """The code and the launchers in `folder`, with a .venv of this Python, whose installs are noted in `installed`.

    Args:
        programs: more of the .venv, by name: the module that each runs.
    """
    for name in ("irdscale", "launch", "configs/deepspeed"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "launch" / "install.sh").write_text(f'echo "$*" >>"{folder}/installed"\n')
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    script(binaries / "python", f'exec {shlex.quote(sys.executable)} "$@"')
    for name, module in programs.items():
        script(binaries / name, f'exec {shlex.quote(sys.executable)} -m {module} "$@"')
    return folder


def environment(checkout: Path, **variables: str) -> dict[str, str]:
    """This one without what schedulers and launchers set, and with a checkout's programs first."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "SLURM_", "GLOO_", "MASTER_"))}
    # What is built when it is first used needs the tools of this Python's environment.
    path = f"{checkout}/.venv/bin:{os.environ['PATH']}:{Path(sys.executable).parent}"
    return {**clean, "PATH": path, "HF_HUB_OFFLINE": "1", **variables}


def needs_namespaces() -> None:
    """Skip the test where no namespaces can be made."""
    made = subprocess.run([*APART, "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this machine lets no test make namespaces: {made.stderr.strip()}")


def apart(checkout: Path, text: str, timeout: float = 600, **variables: str) -> tuple[Any, str]:
    """Run a script as root of a host of its own, with a home; what it did, and the end of all that it said."""
    needs_namespaces()
    home = checkout.parent / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [*APART, "bash", "-euc", f"ip link set lo up\n{text}"],
        env=environment(checkout, HOME=str(home), **variables),
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=timeout,
        errors="replace",
    )
    return done, done.stdout[-6000:] + done.stderr[-6000:]
