"""The supervisor: an actor that starts jobs on the cluster, follows them and ends those that hang.

A job is a function that all ranks of its group run together. Ranks are Ray tasks, because Ray reuses the processes of
tasks with their imports; a single rank with a GPU runs on an actor (`irdscale.cluster.gpu_workers`), to the same end.
The supervisor owns tasks and actors, so these outlive rounds and trials. The placement group of several ranks is
allocated atomically, so two jobs never wait for each other's bundles.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from irdscale.cluster.gpu_workers import GpuWorkers
from irdscale.cluster.worker import RankGroup, run_rank
from irdscale.errors import InputError, RunError
from irdscale.utils.formats import duration

LOOK_S = 0.5
# Time for a cancelled process to end before it is killed.
END_S = 5.0


@dataclass(frozen=True)
class Job:
    """A function for all ranks of a group. A class, because Tune would resolve a dict or list.

    Attributes:
        work: the function, packed, so that only the ranks import what it needs.
        silent_s: longest time in seconds without a report, from its start on.
        limit_s: longest run time in seconds; None for no limit.
        label: facts for the live table.
    """

    name: str
    work: bytes = field(repr=False)
    rank_group: RankGroup
    silent_s: float
    limit_s: float | None = None
    label: dict[str, Any] = field(default_factory=dict)


@dataclass
class _State:
    """A running or finished job.

    Attributes:
        arrived: start time of rank 0; None while the job waits for resources.
        heard: time of the last report.
        where: rank -> node, host and process.
        reports: (step, metric) in order.
    """

    job: Job
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

    @property
    def waiting(self) -> bool:
        """Whether it waits for resources."""
        return self.running and self.arrived is None


class Supervisor:
    """Starts and watches jobs; `irdscale.cluster.connect` makes it an actor."""

    def __init__(self) -> None:
        self._jobs: dict[str, _State] = {}
        self._logs: list[str] = []
        self._closing = False
        self._workers = GpuWorkers(lambda: any(state.waiting for state in self._jobs.values()))

    # Called by the search.

    async def start(self, job: Job) -> None:
        """Start a job, unless one with its name is running."""
        before = self._jobs.get(job.name)
        if before is not None and before.running:
            return
        state = self._jobs[job.name] = _State(job)
        state.task = asyncio.create_task(self._run(state))

    async def follow(self, name: str, seen: int = 0) -> dict[str, Any]:
        """Wait for the job's end, or for report number `seen`.

        Returns:
            {"report": (step, metric)}, or {"result": rank 0's packed result; None if the job never started}.

        Raises:
            InputError, RunError: the job's error.
        """
        state = self._state(name)
        assert state.task is not None
        while len(state.reports) <= seen and not state.task.done():
            state.changed.clear()
            waiting = asyncio.create_task(state.changed.wait())
            await asyncio.wait({state.task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
        if len(state.reports) > seen:
            return {"report": state.reports[seen]}
        return {"result": await asyncio.shield(state.task)}

    async def why(self, name: str) -> str | None:
        """The error of the last job with this name; None if there is none."""
        state = self._jobs.get(name)
        if state is None or state.task is None or not state.task.done() or state.task.cancelled():
            return None
        error = state.task.exception()
        return None if error is None else str(error)

    async def stop(self, name: str) -> None:
        """End a job and wait until it has ended; its result is lost."""
        state = self._jobs.get(name)
        if state is not None and state.running:
            assert state.task is not None
            state.task.cancel()
            await asyncio.wait({state.task})

    async def close(self, closing: bool) -> None:
        """Whether to pause all jobs, which save their state first, and start no new ones."""
        self._closing = closing

    async def idle(self) -> bool:
        """Whether no job is running."""
        return not any(state.running for state in self._jobs.values())

    async def look(self) -> dict[str, Any]:
        """The running jobs with their progress, and log lines since the last call."""
        logs, self._logs = self._logs, []
        now = time.monotonic()
        jobs = [
            {
                **state.job.label,
                "name": state.job.name,
                "begun": None if state.arrived is None else now - state.arrived,
                "host": state.where[0]["host"] if 0 in state.where else None,
                "pids": {rank: where["pid"] for rank, where in state.where.items()},
                **state.facts,
            }
            for state in self._jobs.values()
            if state.running
        ]
        return {"jobs": jobs, "logs": logs}

    # Called by ranks.

    async def arrive(self, name: str, rank: int, where: dict[str, Any], address: str) -> str:
        """Register a started rank; returns the address of rank 0's process group."""
        state = self._state(name)
        if self._closing and state.arrived is None:
            # `_run` cancels this rank: its job must not start any more.
            await asyncio.Event().wait()
        state.where[rank] = where
        state.heard = time.monotonic()
        if rank == 0:
            state.arrived = state.heard
            state.address.set_result(address)
        return await asyncio.shield(state.address)

    async def say(self, name: str, facts: dict[str, Any]) -> bool:
        """Take a job's progress; returns whether the job must pause."""
        state = self._state(name)
        state.heard, state.facts = time.monotonic(), facts
        return self._closing

    async def report(self, name: str, step: int, metric: float) -> None:
        """Take a metric for the scheduler."""
        state = self._state(name)
        state.heard = time.monotonic()
        state.reports.append((step, metric))
        state.changed.set()

    async def log(self, name: str, line: str) -> None:
        self._logs.append(line)

    # The job itself.

    def _state(self, name: str) -> _State:
        if name not in self._jobs:
            raise RunError("the search's supervisor was lost, with its jobs")
        return self._jobs[name]

    async def _run(self, state: _State) -> Any:
        import ray

        job = state.job
        if self._closing:
            return None
        group, worker, ranks, kept = None, None, {}, False
        self._workers.end_others(job.rank_group)
        try:
            if job.rank_group.on_gpu_worker:
                worker = await self._worker(state)
                if worker is None:
                    return None
            elif job.rank_group.size > 1:
                strategy = "SPREAD" if job.rank_group.spread else "PACK"
                group = ray.util.placement_group([job.rank_group.bundle] * job.rank_group.size, strategy)
                await group.ready()
            ranks = _submit(job, group, worker)
            waiting, first = set(ranks.values()), None
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    found = future.result()
                    first = found if found is not None else first
                self._check(state)
                if self._closing and state.arrived is None:
                    return None
            kept = True
            return first
        except InputError as error:
            # Ray's wrapper cannot be sent on.
            raise InputError(" ".join(str(cause_of(error)).split())) from None
        except ray.exceptions.RayError as error:
            raise RunError(_died_of(state, error)) from None
        finally:
            # Whatever went wrong may have left a worker's process unusable.
            await _end(state, ranks, None if kept else worker)
            if worker is not None and kept:
                await self._workers.give_back(job.rank_group, worker)
            if group is not None:
                ray.util.remove_placement_group(group)

    async def _worker(self, state: _State) -> Any:
        """A worker with a GPU for a job; None if the search closes before there is one."""
        taking = asyncio.create_task(self._workers.take(state.job.rank_group))
        try:
            while not taking.done():
                if self._closing:
                    return None
                await asyncio.wait({taking}, timeout=LOOK_S)
            return taking.result()
        finally:
            taking.cancel()

    def _check(self, state: _State) -> None:
        if state.arrived is None:
            return
        now = time.monotonic()
        job = state.job
        if now - state.heard > job.silent_s:
            raise RunError(f"no progress for {duration(job.silent_s)}; last: {_last_seen(state)}")
        if job.limit_s is not None and now - state.arrived > job.limit_s:
            raise RunError(f"not done after {duration(job.limit_s)}; last: {_last_seen(state)}")


def _last_seen(state: _State) -> str:
    step = state.facts.get("step")
    host = state.where[0]["host"] if 0 in state.where else "no node"
    return f"{'before the first step' if step is None else f'step {step}'}, on {host}"


@cache
def _rank_task(fresh: bool) -> Any:
    import ray

    return ray.remote(max_retries=0, max_calls=1 if fresh else 0)(run_rank)


def _submit(job: Job, group: Any, worker: Any) -> dict[Any, asyncio.Future[Any]]:
    """Start all ranks of a job; returns Ray's reference to each, with its future."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    rank_group, ranks = job.rank_group, {}
    supervisor = ray.get_runtime_context().current_actor
    if worker is not None:
        ref = worker.run.remote(supervisor, job.name, rank_group, job.work)
        return {ref: asyncio.wrap_future(ref.future())}
    for rank in range(rank_group.size):
        options = rank_group.options
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        task = _rank_task(rank_group.fresh).options(**options)
        ref = task.remote(supervisor, job.name, rank, rank_group, job.work)
        ranks[ref] = asyncio.wrap_future(ref.future())
    return ranks


async def _end(state: _State, ranks: dict[Any, asyncio.Future[Any]], worker: Any) -> None:
    """End the running ranks, or the worker, by force; a stopped process reacts only to a signal on its own node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    left = {future for future in ranks.values() if not future.done()}
    if left and worker is None:
        for ref, future in ranks.items():
            if future in left:
                ray.cancel(ref, force=True)
        _, left = await asyncio.wait(left, timeout=END_S)
    if left:
        kill = ray.remote(num_cpus=0, max_retries=0)(_kill)
        for where in state.where.values():
            on_its_node = NodeAffinitySchedulingStrategy(where["node"], soft=False)
            kill.options(scheduling_strategy=on_its_node).remote(where["pid"])
    if worker is not None:
        ray.kill(worker)
    if left:
        _, left = await asyncio.wait(left, timeout=END_S)
    for future in ranks.values():
        if future.done() and not future.cancelled():
            future.exception()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def cause_of(error: Exception) -> Exception:
    """An error without Ray's wrapper."""
    while isinstance(getattr(error, "cause", None), Exception):
        error = error.cause  # type: ignore[attr-defined]
    return error


def _died_of(state: _State, error: Any) -> str:
    """A job's error in one line."""
    cause = cause_of(error)
    if cause is not error:
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    hosts = ", ".join(sorted({where["host"] for where in state.where.values()})) or "no node"
    return f"a process was killed, or its node is gone ({type(error).__name__}; {hosts}; {_last_seen(state)})"
