"""What engines are given to call in their tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from irdscale.cluster.worker import SupervisorClient
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError, RunError
from irdscale.search.candidates import Candidate

PATIENCE_S = 240


def meets(config: RunConfig, task: Any, output: Path, place: int, other: int) -> tuple[int, int]:
    """Waits until the other one works too."""
    (output / f"meets-{place}").touch()
    _wait_for(output / f"meets-{other}")
    return place, config.fisher.seed


def gpus(config: RunConfig, task: Any, output: Path) -> float:
    """How many are asked of Ray for this job."""
    import ray

    found: float = ray.get_runtime_context().get_assigned_resources().get("GPU", 0)
    return found


def fails_once(config: RunConfig, task: Any, output: Path) -> str:
    if (output / "failed").exists():
        return "done"
    (output / "failed").touch()
    raise RunError("once")


def evaluates(
    config: RunConfig, output: Path, candidate: Candidate, client: SupervisorClient | None = None
) -> dict[str, Any]:
    """A candidate's record; seed 0 lasts until another one is refused."""
    last_or_not(config, None, output, candidate.seed)
    return candidate.record(config)


def last_or_not(config: RunConfig, task: Any, output: Path, seed: int) -> int:
    if seed == 0:
        _wait_for(output / "refused")
    return seed


def refuses(config: RunConfig, task: Any, output: Path) -> None:
    """Once another one works."""
    _wait_for(output / "meets-5")
    raise InputError("fisher.samples: found too few")


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise AssertionError(f"no {file.name}")
        time.sleep(0.05)
