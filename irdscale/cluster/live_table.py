"""The live table of running jobs on the terminal, and the jobs' log lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from irdscale.utils.formats import count, duration
from irdscale.utils.progress import PLAIN_SECONDS, is_live, say, show_below
from irdscale.utils.terminal import Column, Table

LOOK_S = 1.0
COLUMNS = (
    Column("round", drop=3),
    Column("running", text=True),
    Column("step"),
    Column("loss", drop=2),
    Column("metric", drop=1),
    Column("left"),
    Column("on", text=True, drop=4),
)


@contextmanager
def watching(supervisor: Any, enabled: bool) -> Iterator[None]:
    """Print the jobs' log lines while the body runs, and their table if `enabled`."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(supervisor, enabled, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5 * LOOK_S)
        show_below(None)


def _watch(supervisor: Any, enabled: bool, ended: threading.Event) -> None:
    import ray

    printed = time.monotonic()
    while not ended.wait(LOOK_S):
        try:
            seen = ray.get(supervisor.look.remote(), timeout=10 * LOOK_S)
        except ray.exceptions.GetTimeoutError:
            continue
        except ray.exceptions.RayError:
            return
        for line in seen["logs"]:
            say(f"irdscale: {line}")
        if enabled and is_live():
            show_below(table(seen["jobs"]) if seen["jobs"] else None)
        elif enabled and seen["jobs"] and time.monotonic() - printed >= PLAIN_SECONDS:
            say(line_of_all(seen["jobs"]))
            printed = time.monotonic()


def table(jobs: list[dict[str, Any]]) -> Table:
    """One row per job: round, candidate, step, loss, metric, time left, host; all waiting jobs share one row."""
    return Table(COLUMNS, [cells(job) for job in summed_up(jobs)])


def line_of_all(jobs: list[dict[str, Any]]) -> str:
    """All jobs in one line, for log files."""
    return f"Running: {'; '.join(map(line_of, summed_up(jobs)))}"


def summed_up(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The running jobs, then the waiting ones, several of which become one entry."""
    waiting = [job for job in jobs if job["begun"] is None]
    if len(waiting) > 1:
        waiting = [{"name": f"{len(waiting)} more", "begun": None, "host": None}]
    return [job for job in jobs if job["begun"] is not None] + waiting


def cells(job: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a job's row."""
    step, of, begun = job.get("step"), job.get("of"), job["begun"]
    # Fisher passes report progress through their bar.
    if step is None and job.get("progress"):
        _, step, of, _ = job["progress"]
    # Steps before a resume do not count for the speed.
    made = step - job.get("earlier", 0) if step else 0
    left = duration(begun / made * (of - step)) if begun and made and of else ""
    return (
        "" if job.get("round") is None else str(job["round"]),
        str(job.get("what", job["name"])),
        "waiting" if begun is None else "starting" if step is None else f"{count(step)}/{count(of) if of else '?'}",
        f"{job['loss']:.4f}" if "loss" in job else "",
        f"{job['metric']:.4f}" if "metric" in job else "",
        left,
        job["host"] or "",
    )


def line_of(job: dict[str, Any]) -> str:
    """One job, for `line_of_all`."""
    _, what, step, loss, metric, left, _ = cells(job)
    parts = [what, step if "/" not in step else f"step {step}", loss and f"loss {loss}"]
    parts += [metric and f"metric {metric}", left and f"{left} left"]
    return ", ".join(filter(None, parts))
