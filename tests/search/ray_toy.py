"""Toy searches on Ray: run here or as a command of their own, with processes that are really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

# Saves at every step, so that a killed trial loses at most one.
EVERY_STEP = ["train.save_minutes=0"]
# Ray's processes would wait for those of the tests beside them: its own niceness is 15.
SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}


def set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process start a cluster of its own."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def two_processors(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have searches of this process start a cluster of two processors; call the result with what workers run first.

    It takes the number of GPUs, too.
    """
    set_up(monkeypatch)
    real = ray.init

    def prepare(setup: Callable[[], None] | None = None, gpus: int = 0) -> None:
        def init(**options: Any) -> Any:
            if options["address"] == "local":
                # GPUs by name only.
                options |= {"num_cpus": 2, "num_gpus": gpus}
            if setup is not None:
                options |= {"runtime_env": {"worker_process_setup_hook": setup}}
            return real(**options)

        monkeypatch.setattr(ray, "init", init)

    prepare()
    return prepare


@contextmanager
def one_cluster() -> Iterator[None]:
    """Have all searches of the body use one cluster of two processors, whose processes keep their imports.

    Each of them connects and leaves as far as it can see.
    """
    real, real_shutdown, real_state = ray.init, ray.shutdown, ray.is_initialized
    connected = False

    def init(**options: Any) -> None:
        nonlocal connected
        connected = True
        if not real_state():
            real(**options, num_cpus=2, num_gpus=0)

    def shutdown() -> None:
        nonlocal connected
        connected = False

    with pytest.MonkeyPatch.context() as patch:
        set_up(patch)
        patch.setattr(ray, "init", init)
        patch.setattr(ray, "shutdown", shutdown)
        patch.setattr(ray, "is_initialized", lambda: connected)
        yield
    real_shutdown()


def result_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "result.json").read_text())
    return found


def environment(**more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "WORLD_SIZE")}
    path = os.pathsep.join(filter(None, sys.path))
    return {**own, **SETTINGS, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


@contextmanager
def command(toy: Path, output: Path, *overrides: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    """`irdscale search` on Ray, in a process group of its own, which is gone at the end."""
    saving = [] if any(override.startswith(EVERY_STEP[0].split("=")[0]) for override in overrides) else EVERY_STEP
    arguments = [str(toy), "search.runner=ray", f"output={output}", *saving, *overrides]
    process = subprocess.Popen(
        [sys.executable, "-m", "irdscale", "search", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment(**more),
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        assert process.stderr is not None
        if process.stderr.closed:
            process.wait()
        else:
            process.communicate()


def ends_well(process: subprocess.Popen[str], seconds: float = 420) -> str:
    """Wait for the end; what it said."""
    _, said = process.communicate(timeout=seconds)
    assert process.returncode == 0, said[-3000:]
    return said


def below(pid: int) -> list[psutil.Process]:
    """Every process that a process has started, and they in turn."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def named(processes: list[psutil.Process], name: str) -> list[psutil.Process]:
    """Those whose title says that they run so and so."""
    found = []
    for process in processes:
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def wait_for(what: Callable[[], Any], seconds: float = 180) -> Any:
    """Until `what` gives something, which is returned."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def saved_steps(output: Path) -> dict[str, int]:
    """Key -> step of every training whose state is on disk."""
    found = {}
    for file in output.glob("candidates/state-*/state.json"):
        try:
            found[file.parent.name.removeprefix("state-")] = json.loads(file.read_text())["step"]
        except (OSError, ValueError):
            continue
    return found


def kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)
