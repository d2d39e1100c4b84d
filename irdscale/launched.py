"""Whether torchrun, or another launcher that sets its variables, started this process as one of several ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from irdscale.errors import InputError

# Ranks wait for each other while one reads data or writes a result; a dead one is noticed by `irdscale.watch`.
TIMEOUT = timedelta(hours=6)


def launched() -> tuple[int, int, int]:
    """This process's rank, its rank on its host, and the world size.

    Raises:
        InputError: the launcher's variables are no numbers.
    """
    found = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    found["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", found["RANK"])
    for name, value in found.items():
        if not value.isdigit():
            raise InputError(f"{name}: found {value!r} in the environment; expected a number, as torchrun sets it")
    return int(found["RANK"]), int(found["LOCAL_RANK"]), int(found["WORLD_SIZE"])


def alone(verb: str) -> None:
    """Refuse to run a verb on several ranks that would all do the same.

    Raises:
        InputError: there are several.
    """
    world = launched()[2]
    if world > 1:
        raise InputError(f"{verb}: found {world} ranks (WORLD_SIZE); expected one process: start it without a launcher")


def free_port(host: str = "") -> int:
    """A port that nobody listens on now, at this address of this host, or at any."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextmanager
def joined(always: bool = False) -> Iterator[None]:
    """Run with the process group of all ranks, where there are several: NCCL on GPUs, gloo without.

    Args:
        always: make a group of one where this process is alone, as DeepSpeed wants it.

    Raises:
        InputError: there are more ranks on this host than GPUs.
    """
    rank, local_rank, world = launched()
    if world == 1 and not always:
        yield
        return
    import torch
    import torch.distributed as dist

    if world == 1 and "MASTER_ADDR" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    # Libraries look for all of them.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world)}

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        if local_rank >= gpus:
            raise InputError(f"LOCAL_RANK: found {local_rank}; expected 0 to {gpus - 1}, one rank a GPU")
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if gpus else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
