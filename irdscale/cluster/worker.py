"""One rank of a job on the cluster: joins its group, says that it lives, and does its part."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from irdscale.cluster.share import kept_to
from irdscale.distributed.process_group import environment_restored, free_port, in_process_group, interfaces
from irdscale.utils.interrupts import asking
from irdscale.utils.progress import progress_listener

if TYPE_CHECKING:
    from irdscale.config.schema import DistributedConfig

# How often a rank says how far it is, and hears whether to pause.
SAY_S = 0.5


@dataclass(frozen=True)
class RankGroup:
    """The ranks that a job needs.

    Attributes:
        size: how many ranks; several have a group.
        cpus, gpus: of each rank; with as many threads, and perhaps a share of one GPU.
        spread: on as many nodes as there are, rather than as few.
        grouped: whether one rank has a group too, as DeepSpeed wants it.
        distributed: what they talk with, and how long they wait; the defaults if None.
    """

    size: int = 1
    cpus: int = 1
    gpus: float = 0
    spread: bool = False
    grouped: bool = False
    distributed: DistributedConfig | None = None

    @property
    def fresh(self) -> bool:
        """Whether it needs processes of its own: what DeepSpeed and CUDA keep of a job stays in a process."""
        return self.grouped or self.gpus > 0

    @property
    def bundle(self) -> dict[str, float]:
        """What one rank takes of a node."""
        return {"CPU": float(self.cpus), **({"GPU": float(self.gpus)} if self.gpus else {})}


@dataclass
class SupervisorClient:
    """A job's line to the supervisor: how far it is, and whether it is to pause. Ranks but the first say nothing."""

    supervisor: Any
    name: str
    rank: int
    _said: float = field(default=0.0, init=False)
    _pausing: bool = field(default=False, init=False)
    _facts: dict[str, Any] = field(default_factory=dict, init=False)

    def say(self, now: bool = False, **facts: Any) -> None:
        """Tell how far the job is, at most twice a second unless `now`."""
        self._facts |= facts
        if self.rank == 0 and (now or time.monotonic() - self._said >= SAY_S):
            self._pausing = _answer(self.supervisor.say.remote(self.name, dict(self._facts)))
            self._said = time.monotonic()

    def pausing(self) -> bool:
        """Whether the supervisor has asked it to pause."""
        return self._pausing

    def report(self, step: int, metric: float) -> None:
        """Hand a metric to the scheduler."""
        self.say(now=True, step=step, metric=metric)
        if self.rank == 0:
            _answer(self.supervisor.report.remote(self.name, step, metric))


def _answer(ref: Any) -> Any:
    """What an actor answers to this task, which keeps its processors meanwhile.

    Ray lends them to other tasks while the main thread of one waits, and takes none back: as many as there are tasks
    that wait would run beside this one.
    """
    import ray

    with ThreadPoolExecutor(max_workers=1) as waiting:
        return waiting.submit(ray.get, ref).result()


Work = Callable[[SupervisorClient], Any]


def packed(what: Any) -> bytes:
    """A function, or what it returned, as it travels: who only passes it on need not import what it is made of.

    As Ray itself sends them, between the processes of one search; it is never written to a file.
    """
    import ray

    data: bytes = ray.cloudpickle.dumps(what)
    return data


def unpacked(data: bytes | None) -> Any:
    """What was packed; None where nothing was."""
    import ray

    return None if data is None else ray.cloudpickle.loads(data)


def run_rank(supervisor: Any, name: str, rank: int, rank_group: RankGroup, work: bytes) -> bytes | None:
    """Run one rank's part of a job, which is packed; the first rank's result, packed."""
    import ray

    context = ray.get_runtime_context()
    where = {"node": context.get_node_id(), "pid": os.getpid(), "host": socket.gethostname()}
    ip = ray.util.get_node_ip_address()
    address = f"{ip}:{free_port()}" if rank == 0 and rank_group.size > 1 else ""
    address = _answer(supervisor.arrive.remote(name, rank, where, address))
    import torch

    torch.set_num_threads(rank_group.cpus)
    client = SupervisorClient(supervisor, name, rank)
    with (
        _as_rank(rank, rank_group, address, ip),
        _logged(supervisor, name, rank),
        kept_to(rank_group.gpus),
        progress_listener(lambda *facts: client.say(progress=facts)),
        asking(client.pausing),
        in_process_group(rank_group.distributed, always=rank_group.grouped),
    ):
        try:
            result = unpacked(work)(client)
        except KeyboardInterrupt:
            # It was asked for room while it trained or took samples, and has saved its state.
            return None
    return packed(result) if rank == 0 else None


@contextmanager
def _as_rank(rank: int, rank_group: RankGroup, address: str, ip: str) -> Iterator[None]:
    """The environment that a launcher would give this rank; as it was, for the process's next job, at the end."""
    if rank_group.size == 1 and not rank_group.grouped:
        # By these variables the Trainer would look for others, also where one rank is all.
        yield
        return
    # Ray shows each rank its own GPUs alone.
    local = 0 if rank_group.gpus else rank
    given = {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(rank_group.size)}
    if address:
        host, _, port = address.partition(":")
        given |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    # gloo would take the interface of the host's name, which may be the loopback.
    for interface in interfaces(ip):
        given["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", interface)
    with environment_restored(*{*given, "MASTER_ADDR", "MASTER_PORT"}):
        os.environ |= given
        yield


class _ToSupervisor(logging.Handler):
    """The first rank's log lines go to whoever started the search."""

    def __init__(self, supervisor: Any, name: str) -> None:
        super().__init__()
        self._supervisor, self._name = supervisor, name

    def emit(self, record: logging.LogRecord) -> None:
        self._supervisor.log.remote(self._name, record.getMessage())


@contextmanager
def _logged(supervisor: Any, name: str, rank: int) -> Iterator[None]:
    logger, handler = logging.getLogger("irdscale"), _ToSupervisor(supervisor, name)
    if rank > 0:
        yield
        return
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
