"""The desk: an actor beside the search that starts jobs on the cluster, hears from them, and ends those that hang.

A job is a function of one rank, run on all ranks of a gang at once. Ranks are Ray tasks, for Ray keeps the processes of
tasks for the next ones, with all that they have imported; those of actors end with them. The desk outlives rounds and
trials, so that it can own them. Several ranks get a placement group, which is had whole or not at all: two jobs never
wait for each other's halves.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from irdscale.cluster.ranks import Gang, Work, run_rank
from irdscale.errors import InputError, RunError

Closing = Literal["optional", "all"] | None
LOOK_S = 0.5
# A process that is told to end and does not is killed after so long.
END_S = 5.0


@dataclass
class _Job:
    """A job that runs, or has run.

    Attributes:
        arrived: when its first rank began; None while it waits for room.
        heard: when it last said anything.
        where: of each rank: node, host, process.
        reports: (step, metric) in order.
        optional: whether it waits until no other job waits.
    """

    name: str
    gang: Gang
    optional: bool
    silent_s: float
    limit_s: float | None
    label: dict[str, Any]
    arrived: float | None = None
    heard: float = 0.0
    where: dict[int, dict[str, Any]] = field(default_factory=dict)
    address: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    reports: list[tuple[int, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    task: asyncio.Task[Any] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()


class Desk:
    """Starts and watches jobs; made an actor by `irdscale.cluster.connect`."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._logs: list[str] = []
        self._closing: Closing = None

    # What the search calls.

    async def start(
        self,
        name: str,
        work: Work,
        gang: Gang,
        silent_s: float,
        limit_s: float | None = None,
        optional: bool = False,
        label: dict[str, Any] | None = None,
    ) -> None:
        """Start a job, unless one of this name runs already.

        Args:
            silent_s: how long it may say nothing, once it has begun.
            limit_s: how long it may take, once it has begun.
            optional: begin only when no other job waits for room, and pause when the search closes.
            label: facts about the job for whoever looks.
        """
        job = self._jobs.get(name)
        if job is not None and job.running:
            return
        job = self._jobs[name] = _Job(name, gang, optional, silent_s, limit_s, label or {})
        job.task = asyncio.create_task(self._run(job, work))

    async def follow(self, name: str, seen: int = 0) -> dict[str, Any]:
        """Wait for the next report after `seen` of them, or for the job's end.

        Returns:
            {"report": (step, metric)} or {"result": what the first rank returned}.

        Raises:
            InputError, RunError: as the job.
        """
        job = self._job(name)
        assert job.task is not None
        while len(job.reports) <= seen and not job.task.done():
            job.changed.clear()
            waiting = asyncio.create_task(job.changed.wait())
            await asyncio.wait({job.task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
        if len(job.reports) > seen:
            return {"report": job.reports[seen]}
        return {"result": await asyncio.shield(job.task)}

    async def why(self, name: str) -> str | None:
        """What the last job of this name died of; None if it did not."""
        job = self._jobs.get(name)
        if job is None or job.task is None or not job.task.done() or job.task.cancelled():
            return None
        error = job.task.exception()
        return None if error is None else str(error)

    async def stop(self, name: str) -> None:
        """End a job and wait until it has ended; nothing of it is kept."""
        job = self._jobs.get(name)
        if job is not None and job.running:
            assert job.task is not None
            job.task.cancel()
            await asyncio.wait({job.task})

    async def close(self, closing: Closing) -> None:
        """Ask jobs to save their state and make room, and let none begin: the optional ones, or all; or none again."""
        self._closing = closing

    async def idle(self) -> bool:
        """Whether no job runs."""
        return not any(job.running for job in self._jobs.values())

    async def look(self) -> dict[str, Any]:
        """Who is where and how far, and the log lines since the last look."""
        logs, self._logs = self._logs, []
        now = time.monotonic()
        jobs = [
            {
                **job.label,
                "name": job.name,
                "begun": None if job.arrived is None else now - job.arrived,
                "host": job.where[0]["host"] if 0 in job.where else None,
                "pids": {rank: where["pid"] for rank, where in job.where.items()},
                **job.facts,
            }
            for job in self._jobs.values()
            if job.running
        ]
        return {"jobs": jobs, "logs": logs}

    # What ranks call.

    async def arrive(self, name: str, rank: int, where: dict[str, Any], address: str) -> str:
        """A rank has begun; returns where the first one waits for the others."""
        job = self._job(name)
        job.where[rank] = where
        job.heard = time.monotonic()
        if rank == 0:
            job.arrived = job.heard
            job.address.set_result(address)
        return await asyncio.shield(job.address)

    async def say(self, name: str, facts: dict[str, Any]) -> bool:
        """A job lives, and this is how far it is; returns whether it is to pause."""
        job = self._job(name)
        job.heard, job.facts = time.monotonic(), facts
        return self._closes(job)

    async def report(self, name: str, step: int, metric: float) -> None:
        """A metric for the scheduler."""
        job = self._job(name)
        job.heard = time.monotonic()
        job.reports.append((step, metric))
        job.changed.set()

    async def log(self, name: str, line: str) -> None:
        self._logs.append(line)

    # The job itself.

    def _job(self, name: str) -> _Job:
        if name not in self._jobs:
            raise RunError("the search's desk was lost, and what it watched with it")
        return self._jobs[name]

    async def _run(self, job: _Job, work: Work) -> Any:
        import ray

        while job.optional and not self._closes(job) and self._others_wait():
            await asyncio.sleep(LOOK_S)
        if self._closes(job):
            return None
        group, ranks = None, {}
        try:
            if job.gang.size > 1:
                strategy = "SPREAD" if job.gang.spread else "PACK"
                group = ray.util.placement_group([job.gang.bundle] * job.gang.size, strategy)
                await group.ready()
            ranks = _submit(job, work, group)
            waiting, first = set(ranks.values()), None
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    found = future.result()
                    first = found if found is not None else first
                self._check(job)
                if self._closes(job) and job.arrived is None:
                    return None
            return first
        except InputError as error:
            # Without Ray's wrapping, which does not travel on.
            raise InputError(_plain(error)) from None
        except ray.exceptions.RayError as error:
            raise RunError(_died_of(job, error)) from None
        finally:
            await _end(job, ranks)
            if group is not None:
                ray.util.remove_placement_group(group)

    def _closes(self, job: _Job) -> bool:
        return self._closing == "all" or (self._closing == "optional" and job.optional)

    def _others_wait(self) -> bool:
        return any(job.running and not job.optional and job.arrived is None for job in self._jobs.values())

    def _check(self, job: _Job) -> None:
        if job.arrived is None:
            return
        now = time.monotonic()
        if now - job.heard > job.silent_s:
            raise RunError(f"no progress for {job.silent_s:.0f} s; last: {_place(job)}")
        if job.limit_s is not None and now - job.arrived > job.limit_s:
            raise RunError(f"not done after {job.limit_s:.0f} s; last: {_place(job)}")


def _place(job: _Job) -> str:
    step = job.facts.get("step")
    host = job.where[0]["host"] if 0 in job.where else "no node"
    return f"{'before the first step' if step is None else f'step {step}'}, on {host}"


@cache
def _rank_task(fresh: bool) -> Any:
    import ray

    # Processes with a GPU or a group are not used again: both stay with a process.
    return ray.remote(max_retries=0, max_calls=1 if fresh else 0)(run_rank)


def _submit(job: _Job, work: Work, group: Any) -> dict[Any, asyncio.Future[Any]]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    gang, ranks = job.gang, {}
    desk = ray.get_runtime_context().current_actor
    for rank in range(gang.size):
        strategy: Any = "SPREAD" if gang.spread else "DEFAULT"
        if group is not None:
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        task = _rank_task(gang.fresh).options(num_cpus=gang.cpus, num_gpus=gang.gpus, scheduling_strategy=strategy)
        ref = task.remote(desk, job.name, rank, gang, work)
        ranks[ref] = asyncio.wrap_future(ref.future())
    return ranks


async def _end(job: _Job, ranks: dict[Any, asyncio.Future[Any]]) -> None:
    """End the ranks that still run, by force; a stopped process hears nothing but a signal on its own node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    left = {future for future in ranks.values() if not future.done()}
    for ref, future in ranks.items():
        if future in left:
            ray.cancel(ref, force=True)
    if left:
        _, left = await asyncio.wait(left, timeout=END_S)
    if left:
        kill = ray.remote(num_cpus=0, max_retries=0)(_kill)
        for where in job.where.values():
            on_its_node = NodeAffinitySchedulingStrategy(where["node"], soft=False)
            kill.options(scheduling_strategy=on_its_node).remote(where["pid"])
        _, left = await asyncio.wait(left, timeout=END_S)
    for future in ranks.values():
        if future.done() and not future.cancelled():
            future.exception()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _plain(error: Exception) -> str:
    cause = getattr(error, "cause", None)
    return " ".join(str(cause if cause is not None else error).split())


def _died_of(job: _Job, error: Any) -> str:
    """What a job died of, in one line."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    hosts = ", ".join(sorted({where["host"] for where in job.where.values()})) or "no node"
    return f"a process of it was killed, or its node is gone ({type(error).__name__}; {hosts}; {_place(job)})"
