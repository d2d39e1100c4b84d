"""What the ranks of a job on Ray run: one candidate, or one work item."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from irdscale.cluster.worker import SupervisorClient
from irdscale.config.schema import RunConfig, training_steps
from irdscale.distributed.ranks import rank_and_world
from irdscale.search.candidates import Candidate, records_of, run_candidate
from irdscale.tasks import load_task
from irdscale.training.base_model import KeptBase, keeping
from irdscale.training.control import Control, Paused, SmoothedLoss

if TYPE_CHECKING:
    from irdscale.tasks import Task

T = TypeVar("T")


@lru_cache(maxsize=1)
def _task(config: str) -> Task:
    return load_task(RunConfig.model_validate_json(config))


@lru_cache(maxsize=1)
def _kept_base() -> KeptBase:
    """The base model that this process keeps for its next job."""
    return KeptBase()


def first_rung(config: RunConfig, steps: int) -> int:
    """The step of the first rung in a training of `steps` steps."""
    return max(1, round(config.search.ray.grace_ratio * steps))


def rungs(config: RunConfig, steps: int) -> frozenset[int]:
    """Steps after which the selection metric is measured for early stopping; empty without it."""
    found, rung = set(), first_rung(config, steps)
    while config.search.ray.early_stopping and rung < steps:
        found.add(rung)
        rung *= config.search.ray.reduction_factor
    return frozenset(found)


@contextmanager
def _curves(folder: Path) -> Iterator[Callable[..., None]]:
    """A function `draw(step, name=value, ...)` for an evaluation's TensorBoard curves in `folder`, on rank 0."""
    if rank_and_world()[0] > 0:
        yield lambda step, **values: None
        return
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder))

    def draw(step: int, **values: float) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield draw
    finally:
        writer.close()


def run_work(
    run: RunConfig,
    config: RunConfig,
    output: Path,
    work: Callable[..., T],
    args: tuple[Any, ...],
    client: SupervisorClient,
) -> T:
    """Run `work(config, task, output, *args)` on this rank, with the task of the run's configuration."""
    with keeping(_kept_base()):
        return work(config, _task(run.model_dump_json()), output, *args)


def evaluate_candidate(
    config: RunConfig, output: Path, candidate: Candidate, client: SupervisorClient
) -> dict[str, Any] | None:
    """Evaluate a candidate on this rank; returns its record, or None if the supervisor paused it."""
    task, done, smoothed = _task(config.model_dump_json()), 0, SmoothedLoss()
    steps = training_steps(candidate.config(config).train, len(task.trained))

    def advance(n: int = 1) -> None:
        nonlocal done
        done += n
        losses: dict[str, Any] = {} if smoothed.value is None else {"loss": smoothed.value}
        client.say(step=done, of=steps, **losses)

    def resumed(n: int) -> None:
        client.say(earlier=n)
        advance(n)

    def report(step: int, metric: float) -> None:
        draw(step, selection=metric)
        client.report(step, metric)

    def seen(step: int, loss: float, rate: float) -> None:
        smoothed.add(loss)
        # The integration of TensorBoard draws these itself.
        if "tensorboard" not in config.train.report_to:
            draw(step, loss=loss, learning_rate=rate)

    early = config.search.ray.early_stopping and candidate.round is not None
    with _curves(records_of(config, output, candidate).tensorboard) as draw, keeping(_kept_base()):
        control = Control(
            advance,
            client.pausing,
            rungs(config, steps) if early else frozenset(),
            seen=seen,
            resumed=resumed,
        )
        try:
            record = run_candidate(config, task, output, candidate, control, report if early else None)
        except Paused:
            return None
        if record["status"] == "ok":
            draw(steps, selection=record["metric"])
        return record
