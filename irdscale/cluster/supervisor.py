"""The supervisor: an actor beside the search that starts jobs on the cluster, follows them, and ends those that hang.

A job is a function of one rank, run on all ranks of its group at once. Ranks are Ray tasks: Ray keeps the processes of
tasks for the next ones, with all that they have imported; those of actors end with them. The supervisor outlives rounds
and trials, so that it can own the tasks. The placement group of several ranks is allocated atomically: two jobs never
wait for each other's bundles.
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

from irdscale.cluster.worker import RankGroup, run_rank
from irdscale.errors import InputError, RunError

LOOK_S = 0.5
# A process that is told to end and does not is killed after so long.
END_S = 5.0


@dataclass(frozen=True)
class Job:
    """A function of a rank, run on all ranks of a group; not a dict or list, which Tune would look into.

    Attributes:
        work: the function, packed: what it needs is imported where it runs, and nowhere on the way.
        silent_s: how long it may say nothing, once it has begun.
        limit_s: how long it may take, once it has begun.
        label: facts about the job for whoever looks.
    """

    name: str
    work: bytes = field(repr=False)
    rank_group: RankGroup
    silent_s: float
    limit_s: float | None = None
    label: dict[str, Any] = field(default_factory=dict)


@dataclass
class _State:
    """A job that runs, or has run.

    Attributes:
        arrived: when its first rank began; None while it waits for room.
        heard: when it last said anything.
        where: of each rank: node, host, process.
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


class Supervisor:
    """Starts and watches jobs; made an actor by `irdscale.cluster.connect`."""

    def __init__(self) -> None:
        self._jobs: dict[str, _State] = {}
        self._logs: list[str] = []
        self._closing = False

    # What the search calls.

    async def start(self, job: Job) -> None:
        """Start a job, unless one of its name runs already."""
        before = self._jobs.get(job.name)
        if before is not None and before.running:
            return
        state = self._jobs[job.name] = _State(job)
        state.task = asyncio.create_task(self._run(state))

    async def follow(self, name: str, seen: int = 0) -> dict[str, Any]:
        """Wait for the next report after `seen` of them, or for the job's end.

        Returns:
            {"report": (step, metric)}, or {"result": what the first rank returned, packed; None if it never began}.

        Raises:
            InputError, RunError: as the job.
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
        """What the last job of this name died of; None if it did not."""
        state = self._jobs.get(name)
        if state is None or state.task is None or not state.task.done() or state.task.cancelled():
            return None
        error = state.task.exception()
        return None if error is None else str(error)

    async def stop(self, name: str) -> None:
        """End a job and wait until it has ended; nothing of it is kept."""
        state = self._jobs.get(name)
        if state is not None and state.running:
            assert state.task is not None
            state.task.cancel()
            await asyncio.wait({state.task})

    async def close(self, closing: bool) -> None:
        """Ask all jobs to save their state and pause, and let none begin; or no longer."""
        self._closing = closing

    async def idle(self) -> bool:
        """Whether no job runs."""
        return not any(state.running for state in self._jobs.values())

    async def look(self) -> dict[str, Any]:
        """Who is where and how far, and the log lines since the last look."""
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

    # What ranks call.

    async def arrive(self, name: str, rank: int, where: dict[str, Any], address: str) -> str:
        """A rank has begun; returns where the first one waits for the others."""
        state = self._state(name)
        state.where[rank] = where
        state.heard = time.monotonic()
        if rank == 0:
            state.arrived = state.heard
            state.address.set_result(address)
        return await asyncio.shield(state.address)

    async def say(self, name: str, facts: dict[str, Any]) -> bool:
        """A job lives, and this is how far it is; returns whether it is to pause."""
        state = self._state(name)
        state.heard, state.facts = time.monotonic(), facts
        return self._closing

    async def report(self, name: str, step: int, metric: float) -> None:
        """A metric for the scheduler."""
        state = self._state(name)
        state.heard = time.monotonic()
        state.reports.append((step, metric))
        state.changed.set()

    async def log(self, name: str, line: str) -> None:
        self._logs.append(line)

    # The job itself.

    def _state(self, name: str) -> _State:
        if name not in self._jobs:
            raise RunError("the search's supervisor was lost, and what it watched with it")
        return self._jobs[name]

    async def _run(self, state: _State) -> Any:
        import ray

        job = state.job
        if self._closing:
            return None
        group, ranks = None, {}
        try:
            if job.rank_group.size > 1:
                strategy = "SPREAD" if job.rank_group.spread else "PACK"
                group = ray.util.placement_group([job.rank_group.bundle] * job.rank_group.size, strategy)
                await group.ready()
            ranks = _submit(job, group)
            waiting, first = set(ranks.values()), None
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    found = future.result()
                    first = found if found is not None else first
                self._check(state)
                if self._closing and state.arrived is None:
                    return None
            return first
        except InputError as error:
            # Without Ray's wrapping, which does not travel on.
            raise InputError(" ".join(str(cause_of(error)).split())) from None
        except ray.exceptions.RayError as error:
            raise RunError(_died_of(state, error)) from None
        finally:
            await _end(state, ranks)
            if group is not None:
                ray.util.remove_placement_group(group)

    def _check(self, state: _State) -> None:
        if state.arrived is None:
            return
        now = time.monotonic()
        job = state.job
        if now - state.heard > job.silent_s:
            raise RunError(f"no progress for {job.silent_s:.0f} s; last: {_last_seen(state)}")
        if job.limit_s is not None and now - state.arrived > job.limit_s:
            raise RunError(f"not done after {job.limit_s:.0f} s; last: {_last_seen(state)}")


def _last_seen(state: _State) -> str:
    step = state.facts.get("step")
    host = state.where[0]["host"] if 0 in state.where else "no node"
    return f"{'before the first step' if step is None else f'step {step}'}, on {host}"


@cache
def _rank_task(fresh: bool) -> Any:
    import ray

    # Processes with a GPU or DeepSpeed are not used again: both stay with a process.
    return ray.remote(max_retries=0, max_calls=1 if fresh else 0)(run_rank)


def _submit(job: Job, group: Any) -> dict[Any, asyncio.Future[Any]]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    rank_group, ranks = job.rank_group, {}
    supervisor = ray.get_runtime_context().current_actor
    for rank in range(rank_group.size):
        strategy: Any = "SPREAD" if rank_group.spread else "DEFAULT"
        if group is not None:
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        task = _rank_task(rank_group.fresh).options(
            num_cpus=rank_group.cpus, num_gpus=rank_group.gpus, scheduling_strategy=strategy
        )
        ref = task.remote(supervisor, job.name, rank, rank_group, job.work)
        ranks[ref] = asyncio.wrap_future(ref.future())
    return ranks


async def _end(state: _State, ranks: dict[Any, asyncio.Future[Any]]) -> None:
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
        for where in state.where.values():
            on_its_node = NodeAffinitySchedulingStrategy(where["node"], soft=False)
            kill.options(scheduling_strategy=on_its_node).remote(where["pid"])
        _, left = await asyncio.wait(left, timeout=END_S)
    for future in ranks.values():
        if future.done() and not future.cancelled():
            future.exception()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def cause_of(error: Exception) -> Exception:
    """An error without what Ray puts around it."""
    while isinstance(getattr(error, "cause", None), Exception):
        error = error.cause  # type: ignore[attr-defined]
    return error


def _died_of(state: _State, error: Any) -> str:
    """What a job died of, in one line."""
    cause = cause_of(error)
    if cause is not error:
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    hosts = ", ".join(sorted({where["host"] for where in state.where.values()})) or "no node"
    return f"a process of it was killed, or its node is gone ({type(error).__name__}; {hosts}; {_last_seen(state)})"
