"""One rank of a job on the cluster: it joins its process group, reports progress and runs the job's function."""

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

# Interval of progress reports, whose answer says whether to pause.
SAY_S = 0.5


@dataclass(frozen=True)
class RankGroup:
    """The ranks of a job.

    Attributes:
        size: number of ranks.
        cpus, gpus: resources per rank; CPUs are threads, and GPUs may be a share of one.
        spread: whether to use as many nodes as possible, rather than as few.
        grouped: whether a single rank has a process group too, as DeepSpeed requires.
        distributed: settings of the process group; the defaults if None.
    """

    size: int = 1
    cpus: int = 1
    gpus: float = 0
    spread: bool = False
    grouped: bool = False
    distributed: DistributedConfig | None = None

    @property
    def fresh(self) -> bool:
        """Whether the job needs new processes, because DeepSpeed and NCCL keep state in a process."""
        return self.grouped or (self.gpus > 0 and self.size > 1)

    @property
    def on_gpu_worker(self) -> bool:
        """Whether the job runs on a worker that keeps its GPU (`irdscale.cluster.gpu_workers`)."""
        return self.gpus > 0 and not self.fresh

    @property
    def bundle(self) -> dict[str, float]:
        """Ray resources of one rank."""
        return {"CPU": float(self.cpus), **({"GPU": float(self.gpus)} if self.gpus else {})}

    @property
    def options(self) -> dict[str, Any]:
        """Ray options of one rank that has no placement group."""
        strategy = "SPREAD" if self.spread else "DEFAULT"
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": strategy}


@dataclass
class SupervisorClient:
    """A job's connection to the supervisor, for progress and pauses. Only rank 0 reports."""

    supervisor: Any
    name: str
    rank: int
    _said: float = field(default=0.0, init=False)
    _pausing: bool = field(default=False, init=False)
    _facts: dict[str, Any] = field(default_factory=dict, init=False)

    def say(self, now: bool = False, **facts: Any) -> None:
        """Report progress, at most twice per second unless `now`."""
        self._facts |= facts
        if self.rank == 0 and (now or time.monotonic() - self._said >= SAY_S):
            self._pausing = _answer(self.supervisor.say.remote(self.name, dict(self._facts)))
            self._said = time.monotonic()

    def pausing(self) -> bool:
        """Whether the supervisor asked the job to pause."""
        return self._pausing

    def report(self, step: int, metric: float) -> None:
        """Report a metric to the scheduler."""
        self.say(now=True, step=step, metric=metric)
        if self.rank == 0:
            _answer(self.supervisor.report.remote(self.name, step, metric))


def _answer(ref: Any) -> Any:
    """An actor's answer, awaited in a thread so that this task keeps its CPUs.

    While a task's main thread waits, Ray gives its CPUs to other tasks, which would then run beside it.
    """
    import ray

    with ThreadPoolExecutor(max_workers=1) as waiting:
        return waiting.submit(ray.get, ref).result()


Work = Callable[[SupervisorClient], Any]


def packed(what: Any) -> bytes:
    """A pickled function or result, which processes can pass on without importing its modules.

    Only processes of one search exchange it, as Ray does; it is never written to a file.
    """
    import ray

    data: bytes = ray.cloudpickle.dumps(what)
    return data


def unpacked(data: bytes | None) -> Any:
    """The packed object; None for None."""
    import ray

    return None if data is None else ray.cloudpickle.loads(data)


def run_rank(supervisor: Any, name: str, rank: int, rank_group: RankGroup, work: bytes) -> bytes | None:
    """Run one rank of a packed job; returns rank 0's packed result, None on other ranks."""
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
            # The supervisor paused it, and it has saved its state.
            return None
    return packed(result) if rank == 0 else None


@contextmanager
def _as_rank(rank: int, rank_group: RankGroup, address: str, ip: str) -> Iterator[None]:
    """Set the environment variables of a launcher for this rank, and restore them at the end."""
    if rank_group.size == 1 and not rank_group.grouped:
        # With these variables the Trainer would wait for other ranks.
        yield
        return
    # Ray shows each rank only its own GPUs.
    local = 0 if rank_group.gpus else rank
    given = {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(rank_group.size)}
    if address:
        host, _, port = address.partition(":")
        given |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    # By default gloo uses the interface of the host name, which may be the loopback.
    for interface in interfaces(ip):
        given["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", interface)
    with environment_restored(*{*given, "MASTER_ADDR", "MASTER_PORT"}):
        os.environ |= given
        yield


class _ToSupervisor(logging.Handler):
    """Sends rank 0's log lines to the process of the search."""

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
