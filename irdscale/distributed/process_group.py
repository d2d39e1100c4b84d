"""The process group of the ranks that torchrun, or another launcher that sets its variables, started.

Before they form a group, the ranks meet in the launcher's key-value store: each publishes its software versions, or why
it cannot join.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from irdscale import __version__
from irdscale.errors import InputError, RunError
from irdscale.utils.formats import duration

if TYPE_CHECKING:
    from torch.distributed import Store

    from irdscale.config.schema import DistributedConfig

# Longest wait for a rank to join: a later one has failed, or its node has.
MEETING = timedelta(minutes=10)
SAME_PACKAGES = ("torch", "transformers", "deepspeed")
_ARRIVED, _READ, _PROBLEM = "irdscale/arrived", "irdscale/read", "irdscale/problem"
_POLL_S = 0.1
# Whether this process has joined the others.
_met = False


def launched() -> tuple[int, int, int]:
    """This process's rank, its rank on its host, and the world size.

    Raises:
        InputError: a variable of the launcher is not a number.
    """
    found = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    found["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", found["RANK"])
    for name, value in found.items():
        if not value.isdigit():
            raise InputError(f"found {value!r} in the environment", "a number, as torchrun sets it", key=name)
    return int(found["RANK"]), int(found["LOCAL_RANK"]), int(found["WORLD_SIZE"])


def alone(verb: str) -> None:
    """Refuse to run a verb for one process on several ranks.

    Raises:
        InputError: there are several ranks.
    """
    world = launched()[2]
    if world > 1:
        raise InputError(f"found {world} ranks (WORLD_SIZE)", "one process: start it without a launcher", where=verb)


def free_port(host: str = "") -> int:
    """A free port at this address of this host, or at all its addresses."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def interfaces(ip: str) -> list[str]:
    """This host's network interfaces with this address."""
    import psutil

    return [name for name, has in psutil.net_if_addrs().items() if any(a.address == ip for a in has)]


def versions() -> dict[str, str]:
    """Name -> version of the software that must be the same on all ranks."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"Python": platform.python_version(), "irdscale": __version__}
    for package in SAME_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


@contextmanager
def in_process_group(settings: DistributedConfig | None = None, always: bool = False) -> Iterator[None]:
    """Initialise the process group for the body, if there are several ranks.

    Args:
        settings: backend and timeouts; the defaults if None.
        always: whether a single process forms a group too, which DeepSpeed needs.

    Raises:
        InputError: the host has more ranks than GPUs, or no GPU for NCCL; a rank has other versions or another reason
            not to join (it is named).
        RunError: a rank does not join.
    """
    backend = "auto" if settings is None else settings.backend
    if backend == "nccl" and not _gpus():
        raise InputError("found nccl and no GPU", "auto or gloo", key="distributed.backend")
    if launched()[2] == 1 and not always:
        yield
        return
    # Otherwise later work in this process and its children would look for ranks that have ended.
    variables = environment_restored("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    with variables, _group(settings, *launched()):
        yield


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def environment_restored(*names: str) -> Iterator[None]:
    """Restore environment variables after the body."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _group(settings: DistributedConfig | None, rank: int, local_rank: int, world: int) -> Iterator[None]:
    global _met
    import torch
    import torch.distributed as dist

    from irdscale.config.schema import DistributedConfig
    from irdscale.distributed import watchdog

    settings, gpus = settings or DistributedConfig(), _gpus()
    if world == 1 and "MASTER_ADDR" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    # Libraries read all of these variables.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world)}
    if gpus:
        if local_rank >= gpus:
            raise InputError(f"found {local_rank}", f"0 to {gpus - 1}, one rank a GPU", key="LOCAL_RANK")
        torch.cuda.set_device(local_rank)
    backend = settings.backend if settings.backend != "auto" else "nccl" if gpus else "gloo"
    timeout = timedelta(minutes=settings.timeout_minutes)
    store = _store(rank, world, min(MEETING, timeout))
    _meet(store, rank, world, {**versions(), "distributed.backend": backend}, min(MEETING, timeout))
    _met = True
    store.set_timeout(timeout)
    watchdog.expect_beats_within(settings.silent_seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(rank: int, world: int, wait: timedelta) -> Store:
    """The store at the address in the launcher's variables; rank 0 creates it unless the launcher did.

    Raises:
        RunError: the store does not answer, or not all ranks connect to it.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        store: Store = next(rendezvous("env://", rank, world, timeout=wait))[0]
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(
            f"{world} ranks did not meet at {place} (MASTER_ADDR, MASTER_PORT) within {_words(wait)}: one has ended, "
            f"its node did not come, or a firewall is between them"
        ) from error
    return store


def _meet(store: Store, rank: int, world: int, own: dict[str, str], wait: timedelta) -> None:
    """Wait for all ranks, and check that they have equal settings.

    Args:
        own: name -> value that must be equal on all ranks.

    Raises:
        InputError: a rank refused to join, or differs from rank 0.
        RunError: a rank did not join within `wait`, or the store ended with its host.
    """
    import torch.distributed as dist

    try:
        store.set(_key(rank), json.dumps({"host": socket.gethostname(), **own}))
        store.add(_ARRIVED, 1)
        deadline = time.monotonic() + wait.total_seconds()
        while store.add(_ARRIVED, 0) < world:
            if store.check([_PROBLEM]):
                raise InputError(store.get(_PROBLEM).decode())
            if time.monotonic() > deadline:
                missing = [r for r in range(world) if not store.check([_key(r)])]
                names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
                raise RunError(f"{names} did not come within {_words(wait)}: ended before, or the node is gone")
            time.sleep(_POLL_S)
        found = [json.loads(text) for text in store.multi_get([_key(r) for r in range(world)])]
        problem = _difference(found)
        if problem is not None:
            _let_all_read(store, rank, world)
            raise InputError(problem)
    except dist.DistError as error:
        raise RunError(
            f"rank 0, or the launcher that keeps its store, has ended: {str(error).splitlines()[0]}"
        ) from error


def _difference(found: list[dict[str, str]]) -> str | None:
    """The first difference of a rank from rank 0."""
    first = found[0]
    for rank, other in enumerate(found):
        for name in [*first, *other]:
            if name != "host" and other.get(name) != first.get(name):
                return (
                    f"rank {rank} on {other['host']} has another {name}: found {other.get(name)}; "
                    f"expected {first.get(name)}, as rank 0 on {first['host']}"
                )
    return None


def _let_all_read(store: Store, rank: int, world: int) -> None:
    """Keep rank 0's store until the others have read what it has."""
    store.add(_READ, 1)
    deadline = time.monotonic() + 5
    while rank == 0 and store.add(_READ, 0) < world and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    A rank of a group skips the interpreter's shutdown: threads of gloo and DeepSpeed that still hold tensors sometimes
    abort the process there, and the launcher would report finished work as failed.
    """
    if not _met:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell_others(problem: str) -> None:
    """Tell the ranks of other nodes, which wait in `in_process_group`, why this rank does not join."""
    rank, _, world = launched()
    # torchrun itself ends the ranks of this node; without torchrun's store there may be no listener.
    elsewhere = world > int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if _met or not elsewhere or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    import torch.distributed as dist

    with suppress(RunError, dist.DistError):
        _store(rank, world, timedelta(seconds=5)).set(_PROBLEM, f"rank {rank} on {socket.gethostname()}: {problem}")


def _key(rank: int) -> str:
    return f"irdscale/{rank}"


def _words(wait: timedelta) -> str:
    return duration(wait.total_seconds())
