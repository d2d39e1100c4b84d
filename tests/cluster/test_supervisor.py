"""The supervisor against real processes: what they return, die of, and are ended for.

One cluster of two processors, and of one GPU by name.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

ray = pytest.importorskip("ray", reason="needs ray[tune]")

from irdscale.cluster import connect, share  # noqa: E402
from irdscale.cluster import supervisor as supervisor_module  # noqa: E402
from irdscale.cluster.supervisor import Job  # noqa: E402
from irdscale.cluster.worker import RankGroup, packed, unpacked  # noqa: E402
from irdscale.errors import InputError, RunError  # noqa: E402
from tests.cluster import works  # noqa: E402
from tests.search import ray_toy  # noqa: E402

TWO = RankGroup(size=2)
GPU, HALF = RankGroup(gpus=1), RankGroup(gpus=0.5)


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        ray_toy.set_up(patch)
        patch.setattr(ray, "init", partial(ray.init, num_cpus=2, num_gpus=1))
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        with connect.connected() as cluster:
            assert cluster.own
            yield cluster.supervisor
        signal.signal(signal.SIGTERM, before)


def start(supervisor: Any, name: str, work: Any, rank_group: RankGroup | None = None, **options: Any) -> None:
    connect.answer(
        supervisor.start.remote(Job(name, packed(work), rank_group or RankGroup(), **{"silent_s": 60.0, **options}))
    )


def end_of(supervisor: Any, name: str) -> Any:
    return unpacked(connect.answer(supervisor.follow.remote(name, 0))["result"])


def processes_of(supervisor: Any, names: list[str], rank_group: RankGroup, work: Any = works.answer) -> list[int]:
    """The processes of jobs that start together."""
    for name in names:
        start(supervisor, name, work, rank_group)
    return [end_of(supervisor, name) for name in names]


def until(supervisor: Any, what: Any) -> list[dict[str, Any]]:
    """Look until the running jobs are as wanted."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        jobs = ray.get(supervisor.look.remote())["jobs"]
        if what(jobs):
            return jobs
        time.sleep(0.1)
    raise AssertionError(jobs)


@pytest.mark.usefixtures("supervisor")
def test_who_takes_sigterm_keeps_it() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_a_process_is_used_again(supervisor: Any) -> None:
    found = set()
    for name in ("a", "b", "c"):
        start(supervisor, name, works.answer)
        found.add(end_of(supervisor, name))
    assert len(found) == 1


DEATHS = {
    "bad input": (works.bad_input, {}, InputError, "^train.steps: found nothing$"),
    "error": (works.failing, {}, RunError, "^ZeroDivisionError: by$"),
    "error of a run": (works.refusing, {}, RunError, "^RunError: the disk is full$"),
    "killed": (works.dying, {}, RunError, "a process was killed, or its node is gone .*step 3, on"),
    "silent": (works.silent, {"silent_s": 2.0}, RunError, "no progress for 2.0 s; last: step 7, on"),
    "too long": (works.slow, {"limit_s": 2.0}, RunError, "not done after 2.0 s; last: step"),
}


@pytest.mark.parametrize(
    ("rank_group", "death"),
    [*((RankGroup(), death) for death in DEATHS), *((GPU, death) for death in ("error", "killed", "silent"))],
    ids=lambda value: value if isinstance(value, str) else f"{value.gpus} GPUs",
)
def test_what_a_job_dies_of(supervisor: Any, rank_group: RankGroup, death: str) -> None:
    work, options, error, message = DEATHS[death]
    # The imports of a new process would count as silence.
    assert processes_of(supervisor, ["first"], rank_group)
    start(supervisor, "doomed", work, rank_group, **options)
    with pytest.raises(error, match=message):
        end_of(supervisor, "doomed")
    assert "\n" not in ray.get(supervisor.why.remote("doomed"))
    assert ray.get(supervisor.idle.remote())
    # A stopped process hears no request to end; it is gone all the same, and its room is free again.
    assert not [p for p in psutil.process_iter(["status"]) if p.info["status"] == "stopped" and is_ours(p)]
    for name, wanted in (("next", rank_group), ("other", RankGroup())):
        start(supervisor, name, works.answer, wanted)
    assert end_of(supervisor, "next")
    assert end_of(supervisor, "other")


def is_ours(process: psutil.Process) -> bool:
    return os.getpid() in {parent.pid for parent in process.parents()}


def test_reports_come_in_order_and_log_lines_arrive(supervisor: Any) -> None:
    start(supervisor, "talker", works.reporting)
    assert ray.get(supervisor.follow.remote("talker", 0)) == {"report": (2, 0.5)}
    assert ray.get(supervisor.follow.remote("talker", 1)) == {"report": (4, 0.75)}
    assert unpacked(ray.get(supervisor.follow.remote("talker", 2))["result"]) == "reported"
    # A line travels beside the result, and may come after it.
    lines: list[str] = []
    deadline = time.monotonic() + 30
    while "a line of the log" not in lines and time.monotonic() < deadline:
        lines += ray.get(supervisor.look.remote())["logs"]
    assert "a line of the log" in lines


def test_a_job_that_runs_is_not_started_twice(supervisor: Any) -> None:
    start(supervisor, "once", works.slow, label={"what": "slow"})
    (before,) = until(supervisor, lambda jobs: jobs and jobs[0].get("step", 0) > 3)
    start(supervisor, "once", works.slow)
    (after,) = until(supervisor, lambda jobs: jobs[0]["step"] > before["step"])
    assert after["pids"] == before["pids"]
    assert after["what"] == "slow"
    ray.get(supervisor.stop.remote("once"))
    assert ray.get(supervisor.idle.remote())
    # The kernel takes a moment to end it, and Ray another to reap it.
    deadline = time.monotonic() + 30
    while psutil.pid_exists(after["pids"][0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_jobs_pause_when_the_search_closes_and_none_begin(supervisor: Any) -> None:
    for name in ("first", "second", "third"):
        start(supervisor, name, works.slow)
    until(supervisor, lambda jobs: sum(job["begun"] is not None for job in jobs) == 2)
    begun = {job["name"]: job["begun"] is not None for job in ray.get(supervisor.look.remote())["jobs"]}
    assert sum(begun.values()) == 2, "two processors"
    ray.get(supervisor.close.remote(True))
    try:
        for name, ran in begun.items():
            ended = end_of(supervisor, name)
            assert ended.startswith("paused at") if ran else ended is None
        start(supervisor, "too late", works.answer)
        assert end_of(supervisor, "too late") is None
    finally:
        ray.get(supervisor.close.remote(False))


def test_a_rank_that_arrives_after_the_close_does_not_start_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with a future in the place of the rank's Ray task."""

    async def scenario() -> None:
        # A Ray task gives its resources to the next one before the supervisor looks again.
        monkeypatch.setattr(supervisor_module, "_submit", lambda job, group, worker: {"rank": asyncio.Future()})
        monkeypatch.setattr(ray, "cancel", lambda ref, force: None)
        monkeypatch.setattr(supervisor_module, "END_S", 0.01)
        mine = supervisor_module.Supervisor()
        await mine.start(Job("late", packed(works.answer), RankGroup(), silent_s=60.0))
        await asyncio.sleep(0)
        await mine.close(True)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(mine.arrive("late", 0, {"node": "", "pid": 0, "host": "here"}, ""), 0.1)
        assert await asyncio.wait_for(mine.follow("late"), 10) == {"result": None}

    asyncio.run(scenario())


def test_six_jobs_of_two_ranks_on_two_processors(supervisor: Any) -> None:
    """No two of them hold one processor each and wait for the other's."""
    names = [f"pair {n}" for n in range(6)]
    for name in names:
        start(supervisor, name, works.adding, TWO)
    assert [end_of(supervisor, name) for name in names] == [[3.0, 2, 1]] * 6


def test_one_rank_of_two_is_killed(supervisor: Any, tmp_path: Path) -> None:
    work = partial(works.one_dies, folder=tmp_path)
    start(supervisor, "half", work, TWO)
    with pytest.raises(RunError, match="a process was killed"):
        end_of(supervisor, "half")
    start(supervisor, "half", work, TWO)
    assert end_of(supervisor, "half") == "together"


def test_what_fits(supervisor: Any) -> None:
    assert [connect.fitting(RankGroup(size, cpus)) for size, cpus in ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3))] == [
        2,
        1,
        1,
        0,
        0,
    ]
    assert [connect.fitting(RankGroup(gpus=gpus)) for gpus in (1, 0.5, 0.25, 0.75)] == [1, 2, 2, 1]
    assert connect.fitting(RankGroup(size=2, gpus=1)) == 0


def test_jobs_share_a_gpu_as_far_as_it_goes(supervisor: Any) -> None:
    """Each on a processor of its own; a GPU without CUDA is one by name, whose memory nobody asks for."""
    assert share.cards(0.5) == []
    start(supervisor, "half", works.slow, RankGroup(gpus=0.5))
    until(supervisor, lambda jobs: jobs and jobs[0]["begun"] is not None)
    start(supervisor, "most", works.gpu, RankGroup(gpus=0.75))
    start(supervisor, "other half", works.gpu, RankGroup(gpus=0.5))
    # A processor and half a GPU are free: not enough for the one, enough for the other, which sees the same GPU.
    assert end_of(supervisor, "other half") == ["0", 0, False]
    (first, waiting) = until(supervisor, lambda jobs: len(jobs) == 2)
    assert first["begun"] is not None
    assert waiting["begun"] is None
    ray.get(supervisor.stop.remote("half"))
    assert end_of(supervisor, "most") == ["0", 0, False]


def test_a_process_with_a_gpu_is_used_again(supervisor: Any) -> None:
    one_by_one = [processes_of(supervisor, [name], GPU) for name in ("a", "b", "c")]
    assert one_by_one[0] == one_by_one[1] == one_by_one[2]
    # Jobs that wait for resources get the processes of those that end.
    assert len(set(processes_of(supervisor, [f"queued {n}" for n in range(5)], HALF, works.short))) == 2


@pytest.mark.parametrize("wanted", [RankGroup(), TWO, GPU], ids=["cpu", "two", "gpu"])
def test_idle_processes_with_gpus_end_for_a_job_that_they_cannot_run(supervisor: Any, wanted: RankGroup) -> None:
    """Two of them hold both processors and the GPU."""
    assert len(set(processes_of(supervisor, ["a", "b"], HALF, works.short))) == 2
    start(supervisor, "other", works.short, wanted)
    assert end_of(supervisor, "other")


@pytest.mark.parametrize("wanted", [RankGroup(cpus=2), GPU], ids=["cpus", "gpu"])
def test_a_process_with_a_gpu_ends_when_another_job_waits(supervisor: Any, wanted: RankGroup) -> None:
    start(supervisor, "half", works.short, HALF)
    until(supervisor, lambda jobs: jobs and jobs[0]["begun"] is not None)
    start(supervisor, "waits", works.short, wanted)
    assert end_of(supervisor, "half")
    assert end_of(supervisor, "waits")


def test_a_process_with_a_gpu_is_left_when_it_died_or_its_gpu_failed(supervisor: Any) -> None:
    (first,) = processes_of(supervisor, ["first"], GPU)
    os.kill(first, signal.SIGKILL)
    (second,) = processes_of(supervisor, ["second"], GPU, works.breaking_the_gpu)
    (third,) = processes_of(supervisor, ["third"], GPU)
    assert len({first, second, third}) == 3


def test_jobs_with_a_gpu_stop_while_they_wait_for_it(supervisor: Any) -> None:
    start(supervisor, "first", works.slow, GPU)
    until(supervisor, lambda jobs: jobs and jobs[0]["begun"] is not None)
    start(supervisor, "stopped", works.slow, GPU)
    start(supervisor, "closed", works.slow, GPU)
    ray.get(supervisor.stop.remote("stopped"))
    ray.get(supervisor.close.remote(True))
    try:
        assert end_of(supervisor, "closed") is None
        assert end_of(supervisor, "first").startswith("paused at")
    finally:
        ray.get(supervisor.close.remote(False))
    assert processes_of(supervisor, ["last"], GPU)


def test_the_output_folder_is_checked_and_left_as_it_was(supervisor: Any, tmp_path: Path) -> None:
    connect.check_nodes(tmp_path / "new" / "folder")
    assert not (tmp_path / "new" / "folder").exists()
    (tmp_path / "old").mkdir()
    connect.check_nodes(tmp_path / "old")
    assert not list((tmp_path / "old").iterdir())


def test_a_lost_supervisor_says_so(supervisor: Any) -> None:
    """Its jobs end with it, and whoever follows them is told to start again. The last test, because it kills it."""
    for name, rank_group in (("orphan", RankGroup()), ("orphan on a GPU", GPU)):
        start(supervisor, name, works.slow, rank_group)
    jobs = until(supervisor, lambda jobs: len(jobs) == 2 and all(job["begun"] is not None for job in jobs))
    ray.kill(supervisor, no_restart=False)
    with pytest.raises(RunError, match=r"^the search's supervisor was lost, with its jobs$"):
        end_of(supervisor, "orphan")
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(job["pids"][0]) for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.2)
