"""What the supervisor is given to do in its tests."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

from irdscale.cluster.worker import SupervisorClient
from irdscale.distributed.process_group import launched
from irdscale.errors import InputError, RunError


def answer(client: SupervisorClient) -> int:
    return os.getpid()


def short(client: SupervisorClient) -> int:
    time.sleep(0.5)
    return os.getpid()


def breaking_the_gpu(client: SupervisorClient) -> int:
    """Its process fails from now on, as after an error of a CUDA kernel."""
    import torch

    def fail() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = fail
    return os.getpid()


def gpu(client: SupervisorClient) -> list[Any]:
    """The GPUs that a rank sees, which of them it is to take, and whether the Trainer looks for other ranks."""
    return [os.environ["CUDA_VISIBLE_DEVICES"], launched()[1], "LOCAL_RANK" in os.environ]


def bad_input(client: SupervisorClient) -> None:
    raise InputError("train.steps: found nothing")


def failing(client: SupervisorClient) -> None:
    raise ZeroDivisionError("by\nzero")


def refusing(client: SupervisorClient) -> None:
    raise RunError("the disk is full")


def dying(client: SupervisorClient) -> None:
    client.say(now=True, step=3)
    os.kill(os.getpid(), signal.SIGKILL)


def silent(client: SupervisorClient) -> None:
    """Says nothing, and hears nothing either."""
    client.say(now=True, step=7)
    os.kill(os.getpid(), signal.SIGSTOP)


def slow(client: SupervisorClient) -> str:
    """Works for a long time, and makes room when asked."""
    for step in range(600):
        client.say(step=step)
        if client.pausing():
            return f"paused at {step}"
        time.sleep(0.1)
    return "done"


def reporting(client: SupervisorClient) -> str:
    for step, metric in ((2, 0.5), (4, 0.75)):
        client.report(step, metric)
    logging.getLogger("irdscale.test").warning("a line of the log")
    return "reported"


def adding(client: SupervisorClient) -> Any:
    """A sum over the ranks."""
    import torch
    import torch.distributed as dist

    client.say(now=True, step=1)
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return [total.item(), dist.get_world_size(), torch.get_num_threads()]


def one_dies(client: SupervisorClient, folder: Path) -> Any:
    """The second rank is killed, the first time."""
    import torch.distributed as dist

    from irdscale.distributed.watchdog import watched

    mark = folder / "died"
    first_time = not mark.exists()
    dist.barrier()
    if client.rank == 1 and first_time:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with watched():
        dist.barrier()
    return "together"
