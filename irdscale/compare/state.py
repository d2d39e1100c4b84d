"""The state of a running comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from irdscale.compare.method_specs import Method, rates_of
from irdscale.compare.methods import ModelFacts
from irdscale.config.schema import RunConfig
from irdscale.search.candidates import Candidate
from irdscale.search.mask_store import SearchMasks
from irdscale.search.runner import Engine, Runner

if TYPE_CHECKING:
    from irdscale.tasks import Task


@dataclass
class Study:
    """A running comparison.

    Attributes:
        steps: optimizer steps of one training.
        ranking_masks: (method, seed) -> masks of its ranking.
        halves: (method, seed) -> hash of the mask of half the entries.
        drawn: name -> hash and entries of a mask whose method ranks no samples.
        rates: method -> chosen learning rate; None if every training failed.
        grids: method -> mean on the selection split by learning rate.
        tried: (method, seed) -> its candidates at the chosen rate, the first one first.
        spent: (method, seed) -> number of evaluated candidates, if more than the first.
        gradients: (method, seed) -> sample gradients of FISH draws.
        requested: candidates of all requests, in order.
    """

    config: RunConfig
    task: Task
    engine: Engine
    runner: Runner
    output: Path
    progress: bool
    facts: ModelFacts
    methods: list[Method]
    steps: int
    ranking_masks: dict[tuple[str, int], SearchMasks] = field(default_factory=dict)
    halves: dict[tuple[str, int], str] = field(default_factory=dict)
    drawn: dict[str, tuple[str, int]] = field(default_factory=dict)
    rates: dict[str, float | None] = field(default_factory=dict)
    grids: dict[str, list[dict[str, float | None]]] = field(default_factory=dict)
    tried: dict[tuple[str, int], list[Candidate]] = field(default_factory=dict)
    spent: dict[tuple[str, int], int] = field(default_factory=dict)
    gradients: dict[tuple[str, int], int] = field(default_factory=dict)
    requested: list[Candidate] = field(default_factory=list)

    def of_first(self, count: int) -> Study:
        """The study of the first seeds, before its first evaluation; studies of more seeds share the masks."""
        compare = self.config.compare.model_copy(update={"seeds": self.seeds[:count]})
        config = self.config.model_copy(update={"compare": compare})
        # A field for each: `replace` shares the others, the masks among them.
        return replace(
            self, config=config, rates={}, grids={}, tried={}, spent={}, gradients={}, requested=list[Candidate]()
        )

    def evaluate(self, candidates: Sequence[Candidate]) -> None:
        """Evaluate candidates that the ledger lacks."""
        self.requested += candidates
        self.runner.evaluate(candidates)

    def grid_of(self, method: Method) -> list[float]:
        """The learning rates that a method tries."""
        return rates_of(self.config, method.name)

    @property
    def reference(self) -> str:
        return self.config.compare.reference or self.methods[0].name

    @property
    def seeds(self) -> list[int]:
        return self.config.compare.seeds

    def better(self, metric: float) -> float:
        """The metric with its sign set so that larger is better."""
        return -metric if self.task.lower_is_better else metric

    def best(self, tried: Sequence[Candidate]) -> Candidate | None:
        """The best candidate on the selection split; ties go to the first."""
        ended = [
            (self.better(metric), candidate)
            for candidate in tried
            if (metric := self.runner.metric(candidate)) is not None
        ]
        return max(ended, key=lambda scored: scored[0])[1] if ended else None
