"""The engine of a search or a comparison by `search.runner`; the local one runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from irdscale.cluster import require_ray
from irdscale.config.schema import RunConfig, training_steps
from irdscale.distributed.ranks import rank_and_world
from irdscale.search.candidates import Candidate, run_candidate
from irdscale.search.runner import AskingEngine, WorkItem
from irdscale.training.base_model import KeptBase, keeping
from irdscale.training.control import shown
from irdscale.utils.progress import bar

if TYPE_CHECKING:
    from irdscale.tasks import Task

T = TypeVar("T")


@contextmanager
def running(
    config: RunConfig, task: Task, output: Path, progress: bool, ratio: float | None = None
) -> Iterator[AskingEngine]:
    """The engine that `search.runner` names, for the body.

    Args:
        ratio: share of the parameters that the largest training trains; `search.ratio` if None.
    """
    if config.search.runner == "local":
        base = KeptBase()
        try:
            yield LocalEngine(config, task, output, base, progress)
        finally:
            base.release()
        return
    require_ray()
    from irdscale.search.ray_engine import ray_engine

    with ray_engine(config, task, output, progress, ratio) as engine:
        yield engine


class LocalEngine:
    """Runs one evaluation after another, in this process or on all ranks of a launcher together.

    Args:
        base: keeps the base model between evaluations.
        progress: whether to show a bar of each training.
    """

    def __init__(self, config: RunConfig, task: Task, output: Path, base: KeptBase, progress: bool = False) -> None:
        self._given, self._base = (config, task, output), base
        self._progress = progress and rank_and_world()[0] == 0

    def call(self, work: Callable[..., T], *args: Any) -> T:
        with keeping(self._base):
            return work(*self._given, *args)

    def call_all(
        self,
        calls: Sequence[WorkItem],
        ended: Callable[[int, Any], None] = lambda place, result: None,
        starting: Callable[[int], None] | None = None,
    ) -> list[Any]:
        (own, task, output), results = self._given, []
        for place, call in enumerate(calls):
            if starting is not None:
                starting(place)
            with keeping(self._base):
                results.append(call.work(call.config or own, task, output, *call.args))
            ended(place, results[-1])
        return results

    def evaluate(
        self,
        candidates: Sequence[Candidate],
        ended: Callable[[dict[str, Any]], None],
        starting: Callable[[Candidate], None] | None = None,
    ) -> None:
        config, task, _ = self._given
        for candidate in candidates:
            if starting is not None:
                starting(candidate)
            steps = training_steps(candidate.config(config).train, len(task.trained))
            with bar("Training", steps, enabled=self._progress) as advance:
                record = self.call(run_candidate, candidate, shown(advance))
            ended(record)
