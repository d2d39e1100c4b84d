"""Ranks of a test, as processes forked from one that has imported what all of them need."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

# A process that imports them for itself takes longer for that than most tests' ranks do for their work.
NEEDED = ["irdscale.training.trainer", "transformers.models.auto.modeling_auto", "deepspeed"]


def run_ranks(work: Callable[..., None], world: int, *arguments: Any, join: bool = True) -> Any:
    """Run `work(rank, world, *arguments)` on ranks, all of which must come to its end.

    Args:
        work: of a module's own, for its name is sent.
        join: wait for them; else what is returned holds their processes.
    """
    # A process that has asked for CUDA devices cannot be forked.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    mp.set_forkserver_preload(NEEDED)
    call = (work, world, dict(os.environ), arguments)
    return mp.start_processes(_rank, call, world, join, start_method=method)


def _rank(rank: int, work: Any, world: int, environment: dict[str, str], arguments: tuple[Any, ...]) -> None:
    # So far they are those of the time when the first ranks were started.
    os.environ.clear()
    os.environ |= environment
    # A training has all objects looked through for garbage: those of imports are none.
    gc.freeze()
    work(rank, world, *arguments)
