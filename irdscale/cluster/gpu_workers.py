"""Processes with a GPU, which the supervisor keeps between jobs, with their imports and their base model.

Ray ends the process of a task with a GPU, because CUDA stays on the device that the process used first. An actor has
the same device, or the same share of it, for its whole life. It holds these resources while it is idle too, so idle
workers end as soon as a job waits that none of them can run.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from typing import Any

from irdscale.cluster.worker import RankGroup, run_rank


class GpuWorker:
    """Runs jobs of one rank, one after another; `GpuWorkers` makes it an actor."""

    def run(self, supervisor: Any, name: str, rank_group: RankGroup, work: bytes) -> bytes | None:
        """`run_rank` as rank 0."""
        return run_rank(supervisor, name, 0, rank_group, work)

    def ready(self) -> bool:
        """Whether it can run a job; frees cached GPU memory. A CUDA error lasts as long as its process."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return True
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True


class GpuWorkers:
    """The workers of a supervisor; all calls come from its event loop.

    Args:
        waiting: whether any job waits for resources.
    """

    def __init__(self, waiting: Callable[[], bool]) -> None:
        self._waiting = waiting
        self._idle: list[tuple[RankGroup, Any]] = []
        self._asked: list[tuple[RankGroup, asyncio.Future[Any]]] = []

    async def take(self, rank_group: RankGroup) -> Any:
        """An idle worker with these resources; else the first that another job gives back, or a new one.

        Raises:
            RayError: a new worker could not start.
        """
        import ray

        while (idle := self._pop(rank_group)) is not None:
            if await _ready(idle):
                return idle
            ray.kill(idle)
        given = asyncio.get_running_loop().create_future()
        new = ray.remote(GpuWorker).options(**rank_group.options).remote()
        started = asyncio.wrap_future(new.ready.remote().future())
        # The error of a worker that is ended here is of no interest.
        started.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._asked.append((rank_group, given))
        try:
            await asyncio.wait({started, given}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            ray.kill(new)
            if given.done():
                ray.kill(given.result())
            raise
        finally:
            self._asked.remove((rank_group, given))
        if given.done():
            ray.kill(new)
            return given.result()
        started.result()
        return new

    async def give_back(self, rank_group: RankGroup, worker: Any) -> None:
        """Keep a worker whose job ended with a result: for a job that waits for one, or idle if no job waits."""
        import ray

        usable = await _ready(worker)
        asked = [given for wanted, given in self._asked if wanted == rank_group and not given.done()]
        if usable and asked:
            asked[0].set_result(worker)
        elif usable and not self._waiting():
            self._idle.append((rank_group, worker))
        else:
            ray.kill(worker)

    def end_others(self, rank_group: RankGroup) -> None:
        """End idle workers with other resources, so that a job with these can start."""
        import ray

        for held, worker in self._idle:
            if held != rank_group:
                ray.kill(worker)
        self._idle = [(held, worker) for held, worker in self._idle if held == rank_group]

    def _pop(self, rank_group: RankGroup) -> Any:
        for place, (held, worker) in enumerate(self._idle):
            if held == rank_group:
                del self._idle[place]
                return worker
        return None


async def _ready(worker: Any) -> bool:
    """Whether a worker can run a job; False too if its process or node is gone."""
    import ray

    try:
        return bool(await worker.ready.remote())
    except ray.exceptions.RayError:
        return False
