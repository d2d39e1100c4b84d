"""The desk against real processes: what they return, die of, and are ended for.

One cluster of two processors, and of one GPU by name.
"""

from __future__ import annotations

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
from irdscale.cluster.supervisor import Job  # noqa: E402
from irdscale.cluster.worker import Gang, packed, unpacked  # noqa: E402
from irdscale.errors import InputError, RunError  # noqa: E402
from tests.cluster import works  # noqa: E402

TWO = Gang(size=2)


@pytest.fixture(scope="module")
def desk() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(ray, "init", partial(ray.init, num_cpus=2, num_gpus=1))
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        with connect.connected() as cluster:
            assert cluster.own
            yield cluster.desk
        signal.signal(signal.SIGTERM, before)


def start(desk: Any, name: str, work: Any, gang: Gang | None = None, **options: Any) -> None:
    connect.answer(desk.start.remote(Job(name, packed(work), gang or Gang(), **{"silent_s": 60.0, **options})))


def end_of(desk: Any, name: str) -> Any:
    return unpacked(connect.answer(desk.follow.remote(name, 0))["result"])


def until(desk: Any, what: Any) -> list[dict[str, Any]]:
    """Look until the running jobs are as wanted."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        jobs = ray.get(desk.look.remote())["jobs"]
        if what(jobs):
            return jobs
        time.sleep(0.1)
    raise AssertionError(jobs)


@pytest.mark.usefixtures("desk")
def test_who_takes_sigterm_keeps_it() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_a_process_is_used_again(desk: Any) -> None:
    found = set()
    for name in ("a", "b", "c"):
        start(desk, name, works.answer)
        found.add(end_of(desk, name))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("work", "options", "error", "message"),
    [
        (works.bad_input, {}, InputError, "^train.steps: found nothing$"),
        (works.failing, {}, RunError, "^ZeroDivisionError: by$"),
        (works.refusing, {}, RunError, "^RunError: the disk is full$"),
        (works.dying, {}, RunError, "a process of it was killed, or its node is gone .*step 3, on"),
        (works.silent, {"silent_s": 2.0}, RunError, "no progress for 2 s; last: step 7, on"),
        (works.slow, {"limit_s": 2.0}, RunError, "not done after 2 s; last: step"),
    ],
)
def test_what_a_job_dies_of(desk: Any, work: Any, options: Any, error: type[Exception], message: str) -> None:
    start(desk, "doomed", work, **options)
    with pytest.raises(error, match=message):
        end_of(desk, "doomed")
    assert "\n" not in ray.get(desk.why.remote("doomed"))
    assert ray.get(desk.idle.remote())
    # A stopped process hears no request to end; it is gone all the same, and its room is free again.
    assert not [p for p in psutil.process_iter(["status"]) if p.info["status"] == "stopped" and is_ours(p)]
    for name in ("next", "other"):
        start(desk, name, works.answer)
    assert end_of(desk, "next")
    assert end_of(desk, "other")


def is_ours(process: psutil.Process) -> bool:
    return os.getpid() in {parent.pid for parent in process.parents()}


def test_reports_come_in_order_and_log_lines_arrive(desk: Any) -> None:
    start(desk, "talker", works.reporting)
    assert ray.get(desk.follow.remote("talker", 0)) == {"report": (2, 0.5)}
    assert ray.get(desk.follow.remote("talker", 1)) == {"report": (4, 0.75)}
    assert unpacked(ray.get(desk.follow.remote("talker", 2))["result"]) == "reported"
    assert "a line of the log" in ray.get(desk.look.remote())["logs"]


def test_a_job_that_runs_is_not_started_twice(desk: Any) -> None:
    start(desk, "once", works.slow, label={"what": "slow"})
    (before,) = until(desk, lambda jobs: jobs and jobs[0].get("step", 0) > 3)
    start(desk, "once", works.slow)
    (after,) = until(desk, lambda jobs: jobs[0]["step"] > before["step"])
    assert after["pids"] == before["pids"]
    assert after["what"] == "slow"
    ray.get(desk.stop.remote("once"))
    assert ray.get(desk.idle.remote())
    # The kernel takes a moment to end it, and Ray another to reap it.
    deadline = time.monotonic() + 30
    while psutil.pid_exists(after["pids"][0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_jobs_pause_when_the_search_closes_and_none_begin(desk: Any) -> None:
    for name in ("first", "second", "third"):
        start(desk, name, works.slow)
    until(desk, lambda jobs: sum(job["begun"] is not None for job in jobs) == 2)
    begun = {job["name"]: job["begun"] is not None for job in ray.get(desk.look.remote())["jobs"]}
    assert sum(begun.values()) == 2, "two processors"
    ray.get(desk.close.remote(True))
    for name, ran in begun.items():
        ended = end_of(desk, name)
        assert ended.startswith("paused at") if ran else ended is None
    start(desk, "too late", works.answer)
    assert end_of(desk, "too late") is None
    ray.get(desk.close.remote(False))


def test_six_jobs_of_two_ranks_on_two_processors(desk: Any) -> None:
    """No two of them hold one processor each and wait for the other's."""
    names = [f"pair {n}" for n in range(6)]
    for name in names:
        start(desk, name, works.adding, TWO)
    assert [end_of(desk, name) for name in names] == [[3.0, 2, 1]] * 6


def test_one_rank_of_two_is_killed(desk: Any, tmp_path: Path) -> None:
    work = partial(works.one_dies, folder=tmp_path)
    start(desk, "half", work, TWO)
    with pytest.raises(RunError, match="a process of it was killed"):
        end_of(desk, "half")
    start(desk, "half", work, TWO)
    assert end_of(desk, "half") == "together"


def test_what_fits(desk: Any) -> None:
    assert [connect.fitting(Gang(size, cpus)) for size, cpus in ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3))] == [
        2,
        1,
        1,
        0,
        0,
    ]
    assert [connect.fitting(Gang(gpus=gpus)) for gpus in (1, 0.5, 0.25, 0.75)] == [1, 2, 2, 1]
    assert connect.fitting(Gang(size=2, gpus=1)) == 0


def test_jobs_share_a_gpu_as_far_as_it_goes(desk: Any) -> None:
    """Each on a processor of its own; a GPU without CUDA is one by name, whose memory nobody asks for."""
    assert share.cards(0.5) == []
    start(desk, "half", works.slow, Gang(gpus=0.5))
    until(desk, lambda jobs: jobs and jobs[0]["begun"] is not None)
    start(desk, "most", works.gpu, Gang(gpus=0.75))
    start(desk, "other half", works.gpu, Gang(gpus=0.5))
    # A processor and half a GPU are free: not enough for the one, enough for the other, which sees the same GPU.
    assert end_of(desk, "other half") == ["0", 0, False]
    (first, waiting) = until(desk, lambda jobs: len(jobs) == 2)
    assert first["begun"] is not None
    assert waiting["begun"] is None
    ray.get(desk.stop.remote("half"))
    assert end_of(desk, "most") == ["0", 0, False]


def test_the_output_folder_is_checked_and_left_as_it_was(desk: Any, tmp_path: Path) -> None:
    connect.check_nodes(tmp_path / "new" / "folder")
    assert not (tmp_path / "new" / "folder").exists()
    (tmp_path / "old").mkdir()
    connect.check_nodes(tmp_path / "old")
    assert not list((tmp_path / "old").iterdir())


def test_a_lost_desk_says_so(desk: Any) -> None:
    """Its jobs end with it, and whoever follows them is told to start again. Last, for it takes the desk."""
    start(desk, "orphan", works.slow)
    (job,) = until(desk, lambda jobs: jobs and jobs[0]["begun"] is not None)
    ray.kill(desk, no_restart=False)
    with pytest.raises(RunError, match=r"^the search's desk was lost, and what it watched with it$"):
        end_of(desk, "orphan")
    deadline = time.monotonic() + 30
    while psutil.pid_exists(job["pids"][0]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
