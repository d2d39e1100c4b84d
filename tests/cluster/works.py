"""What the desk is given to do in its tests."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

from irdscale.cluster.worker import Talk
from irdscale.distributed.process_group import launched
from irdscale.errors import InputError, RunError


def answer(talk: Talk) -> int:
    return os.getpid()


def gpu(talk: Talk) -> list[Any]:
    """The GPUs that a rank sees, which of them it is to take, and whether the Trainer looks for other ranks."""
    return [os.environ["CUDA_VISIBLE_DEVICES"], launched()[1], "LOCAL_RANK" in os.environ]


def bad_input(talk: Talk) -> None:
    raise InputError("train.steps: found nothing")


def failing(talk: Talk) -> None:
    raise ZeroDivisionError("by\nzero")


def refusing(talk: Talk) -> None:
    raise RunError("the disk is full")


def dying(talk: Talk) -> None:
    talk.say(now=True, step=3)
    os.kill(os.getpid(), signal.SIGKILL)


def silent(talk: Talk) -> None:
    """Says nothing, and hears nothing either."""
    talk.say(now=True, step=7)
    os.kill(os.getpid(), signal.SIGSTOP)


def slow(talk: Talk) -> str:
    """Works for a long time, and makes room when asked."""
    for step in range(600):
        talk.say(step=step)
        if talk.pausing():
            return f"paused at {step}"
        time.sleep(0.1)
    return "done"


def reporting(talk: Talk) -> str:
    for step, metric in ((2, 0.5), (4, 0.75)):
        talk.report(step, metric)
    logging.getLogger("irdscale.test").warning("a line of the log")
    return "reported"


def adding(talk: Talk) -> Any:
    """A sum over the ranks."""
    import torch
    import torch.distributed as dist

    talk.say(now=True, step=1)
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return [total.item(), dist.get_world_size(), torch.get_num_threads()]


def one_dies(talk: Talk, folder: Path) -> Any:
    """The second rank is killed, the first time."""
    import torch.distributed as dist

    from irdscale.distributed.watchdog import watched

    mark = folder / "died"
    first_time = not mark.exists()
    dist.barrier()
    if talk.rank == 1 and first_time:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with watched():
        dist.barrier()
    return "together"
