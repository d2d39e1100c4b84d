"""The local engine: one evaluation after another, in this process or on all ranks of a launcher together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from irdscale.config.schema import RunConfig
from irdscale.search.candidates import Candidate, run_candidate
from irdscale.search.runner import WorkItem
from irdscale.training.base_model import KeptBase, keeping

if TYPE_CHECKING:
    from irdscale.tasks import Task

T = TypeVar("T")


class LocalEngine:
    """Runs everything in the calling process, with one base model; see `irdscale.search.runner.Engine`."""

    def __init__(self, config: RunConfig, task: Task, output: Path) -> None:
        self._given, self._base = (config, task, output), KeptBase()

    def release(self) -> None:
        """Free the base model."""
        self._base.release()

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
            with keeping(self._base):
                record = run_candidate(*self._given, candidate)
            ended(record)
