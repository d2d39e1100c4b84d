"""Ranks and commands of a test, as processes forked from one that has imported what all of them need."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

# A process that imports them for itself takes longer for that than most tests' ranks do for their work.
NEEDED = [
    "irdscale.cli.command_line",
    "irdscale.search.run",
    "irdscale.tasks.metrics.scores",
    "irdscale.training.one_mask",
    "transformers.models.auto.modeling_auto",
    "deepspeed",
]
OUTPUTS = ("stdout", "stderr")
# A process that has asked for CUDA devices cannot be forked.
METHOD = "spawn" if torch.cuda.is_available() else "forkserver"


def run_ranks(work: Callable[..., None], world: int, *arguments: Any, join: bool = True) -> Any:
    """Run `work(rank, world, *arguments)` on ranks, all of which must come to its end.

    Args:
        work: of a module's own, for its name is sent.
        join: wait for them; else what is returned holds their processes.
    """
    mp.set_forkserver_preload(NEEDED)
    call = (work, world, dict(os.environ), arguments)
    return mp.start_processes(_rank, call, world, join, start_method=METHOD)


def _rank(rank: int, work: Any, world: int, environment: dict[str, str], arguments: tuple[Any, ...]) -> None:
    _begin(environment)
    work(rank, world, *arguments)


def _begin(environment: dict[str, str]) -> None:
    # So far they are those of the time when the first ranks were started.
    os.environ.clear()
    os.environ |= environment
    # A training has all objects looked through for garbage: those of imports are none.
    gc.freeze()


@dataclass
class Command:
    """`irdscale ARGUMENTS` in a process of its own."""

    process: BaseProcess
    _outputs: tempfile.TemporaryDirectory[str]

    def ended(self, seconds: float = 300) -> tuple[int | None, str, str]:
        """Wait for the end; exit code, stdout and stderr."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "still runs"
        stdout, stderr = (Path(self._outputs.name, name).read_text() for name in OUTPUTS)
        return self.process.exitcode, stdout, stderr


def start_command(arguments: list[str], **variables: str) -> Command:
    """Start `irdscale ARGUMENTS` in this folder, with more variables in its environment."""
    outputs = tempfile.TemporaryDirectory(prefix="irdscale-")
    context = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        context.set_forkserver_preload(NEEDED)
    call = (arguments, os.getcwd(), {**os.environ, **variables}, outputs.name)
    process = context.Process(target=_command, args=call)  # type: ignore[attr-defined]
    process.start()
    return Command(process, outputs)


def start_command_on_ranks(arguments: list[str], world: int, **variables: str) -> list[Command]:
    """Start a command on ranks, with what a launcher says in their environment."""
    from irdscale.distributed.process_group import free_port

    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    own = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **variables} for rank in range(world)]
    return [start_command(arguments, **of_rank) for of_rank in own]


def _command(arguments: list[str], folder: str, environment: dict[str, str], outputs: str) -> None:
    from irdscale.cli.command_line import main

    _begin(environment)
    os.chdir(folder)
    for number, name in enumerate(OUTPUTS, start=1):
        with Path(outputs, name).open("wb") as file:
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    sys.argv = ["irdscale", *arguments]
    main()
