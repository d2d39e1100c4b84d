"""The engine of a search or a comparison by `search.runner`; the local one runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from irdscale.cluster import require_ray
from irdscale.config.schema import RunConfig
from irdscale.search.candidates import Candidate, run_candidate
from irdscale.search.runner import Engine, WorkItem
from irdscale.training.base_model import KeptBase, keeping

if TYPE_CHECKING:
    from irdscale.tasks import Task

T = TypeVar("T")


@contextmanager
def running(config: RunConfig, task: Task, output: Path, progress: bool) -> Iterator[Engine]:
    """The engine that `search.runner` names, for the body."""
    if config.search.runner == "local":
        base = KeptBase()
        try:
            yield LocalEngine(config, task, output, base)
        finally:
            base.release()
        return
    require_ray()
    from irdscale.search.ray_engine import ray_engine

    with ray_engine(config, task, output, progress) as engine:
        yield engine


class LocalEngine:
    """Runs one evaluation after another, in this process or on all ranks of a launcher together.

    Args:
        base: keeps the base model between evaluations.
    """

    def __init__(self, config: RunConfig, task: Task, output: Path, base: KeptBase) -> None:
        self._given, self._base = (config, task, output), base

    def call(self, work: Callable[..., T], *args: Any) -> T:
        with keeping(self._base):
            return work(*self._given, *args)

    def call_all(
        self, calls: Sequence[WorkItem], ended: Callable[[int, Any], None] = lambda place, result: None
    ) -> list[Any]:
        (own, task, output), results = self._given, []
        for place, call in enumerate(calls):
            with keeping(self._base):
                results.append(call.work(call.config or own, task, output, *call.args))
            ended(place, results[-1])
        return results

    def evaluate(self, candidates: Sequence[Candidate], ended: Callable[[dict[str, Any]], None]) -> None:
        for candidate in candidates:
            ended(self.call(run_candidate, candidate))
