"""The runner: answers evaluations from the ledger, and has the engine run those that are missing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import remove_folder
from irdscale.search.candidates import Candidate, candidate_adapter, in_words
from irdscale.search.ird import Pair, best_of
from irdscale.search.ledger import Ledger
from irdscale.training.loss_trend import rise_warnings

T = TypeVar("T")
# Names of a search's baselines, by `Candidate.direction`.
BASELINES = {"random": "random samples", "probe": "head only"}


def evaluated(mask: str | None, seed: int) -> Candidate:
    """A candidate with the same key as the evaluation of this mask and seed, whatever its pair."""
    return Candidate(mask, Pair(0, 0), seed, None, "")


@dataclass(frozen=True)
class WorkItem:
    """A call `work(config, task, output, *args)`.

    Attributes:
        config: replaces the run's configuration; same model and task.
        light: whether it needs no more memory than a trial, so it may share a GPU.
    """

    work: Callable[..., Any]
    args: tuple[Any, ...] = ()
    config: RunConfig | None = None
    light: bool = False


def _named(record: dict[str, Any]) -> str:
    words = in_words(record["samples"], record["params"], record["seed"], record["direction"])
    return f"{words} ({record['key'][:8]})"


class Engine(Protocol):
    """Runs candidates and Fisher passes."""

    def call(self, work: Callable[..., T], *args: Any) -> T:
        """Run `work(config, task, output, *args)` on the ranks of Fisher passes; returns rank 0's result."""

    def call_all(
        self, calls: Sequence[WorkItem], ended: Callable[[int, Any], None] = lambda place, result: None
    ) -> list[Any]:
        """Run work items, possibly side by side; returns their results in order.

        Args:
            ended: called with the position and the result of each item when it ends.
        """

    def evaluate(self, candidates: Sequence[Candidate], ended: Callable[[dict[str, Any]], None]) -> None:
        """Evaluate candidates with distinct keys; calls `ended` with the record of each when it ends."""


class AskingEngine(Engine, Protocol):
    """An engine that asks before each start.

    `starting` is called with the candidate, or the position of the work item, that would start now. What it raises is
    raised when all that runs has ended, and nothing more starts.
    """

    def call_all(
        self,
        calls: Sequence[WorkItem],
        ended: Callable[[int, Any], None] = lambda place, result: None,
        starting: Callable[[int], None] | None = None,
    ) -> list[Any]: ...

    def evaluate(
        self,
        candidates: Sequence[Candidate],
        ended: Callable[[dict[str, Any]], None],
        starting: Callable[[Candidate], None] | None = None,
    ) -> None: ...


class Runner:
    """Evaluates candidates and records them in the ledger; evaluations in the ledger are not run again.

    Args:
        advance: advances the progress bar by an evaluation.
        methods: direction of a candidate -> name of its method in the bar; none for the search's own candidates.

    Attributes:
        asked: keys of the requested evaluations, in order of the first request.
        reused: number of requests for an evaluation that another pair with the same mask had requested.
        metrics: (pair, seed) -> selection metric of every candidate that finished.
    """

    def __init__(
        self,
        config: RunConfig,
        ledger: Ledger,
        engine: Engine,
        output: Path,
        advance: Callable[..., None] = lambda n=1, note="", earlier=False, **shown: None,
        lower_is_better: bool = False,
        methods: Mapping[str, str] = BASELINES,
    ) -> None:
        self._config, self._ledger, self._engine, self._output = config, ledger, engine, output
        self._advance, self._lower_is_better, self._methods = advance, lower_is_better, methods
        # Evaluations of an earlier run do not count for the speed of this one.
        self._earlier = frozenset(ledger.finished)
        self.asked: list[str] = []
        self.reused = 0
        self.metrics: dict[tuple[Pair, int], float] = {}
        self._best: dict[str, float] = {}

    def evaluate_round(
        self, round_number: int, wanted: list[tuple[Pair, int]], masks: dict[Pair, str]
    ) -> list[float | None]:
        """Evaluate a round's candidates; None for a failure. Keeps only the adapters of the best pair so far."""
        direction = self._config.search.direction
        metrics = self.evaluate([Candidate(masks[pair], pair, seed, round_number, direction) for pair, seed in wanted])
        for (pair, seed), metric in zip(wanted, metrics, strict=True):
            if metric is not None:
                self.metrics[pair, seed] = metric
        self._drop_followers(masks)
        return metrics

    def evaluate(self, wanted: Sequence[Candidate]) -> list[float | None]:
        """The selection metric of each candidate, from the ledger or by training; None for a failure."""
        ended_before = self._ledger.finished.keys() | self._stopped().keys()
        missing: dict[str, Candidate] = {}
        for candidate in wanted:
            key = candidate.key(self._config)
            if key in self.asked:
                self.reused += 1
            else:
                self.asked.append(key)
            if key in ended_before or key in missing:
                self._show(candidate, earlier=key in self._earlier)
            else:
                missing[key] = candidate

        def ended(record: dict[str, Any]) -> None:
            self._ledger.append(record)
            self._show(missing[record["key"]])

        if missing:
            self._engine.evaluate(list(missing.values()), ended)
        return [self.metric(candidate) for candidate in wanted]

    def _show(self, candidate: Candidate, earlier: bool = False) -> None:
        """Advance the bar by an evaluation, with its method and the method's best metric of one evaluation so far."""
        metric, way = self.metric(candidate), candidate.direction
        if metric is not None:
            best = min if self._lower_is_better else max
            self._best[way] = best(metric, self._best.get(way, metric))
        method = self._methods.get(way)
        self._advance(note=str(candidate), earlier=earlier, method=method, best=self._best.get(way))

    def metric(self, candidate: Candidate) -> float | None:
        """The selection metric of an evaluation; None if the ledger has no finished one."""
        record = self._ledger.finished.get(candidate.key(self._config))
        return None if record is None else record["metric"]

    def error(self, candidate: Candidate) -> str | None:
        """The error of an evaluation's last failed try; None if there is none."""
        key = candidate.key(self._config)
        failed = [record["error"] for record in self._ledger.records if record["key"] == key]
        return failed[-1] if failed else None

    def trend(self, candidate: Candidate) -> dict[str, Any] | None:
        """Start and end of a finished evaluation's training loss; None if unknown."""
        record = self._ledger.finished.get(candidate.key(self._config), {})
        return record.get("loss")

    def costs(self, candidate: Candidate) -> dict[str, Any]:
        """ "seconds", "adapter_bytes" and "peak_bytes" of a finished evaluation; None for what is unknown."""
        record = self._ledger.finished.get(candidate.key(self._config), {})
        return {name: record.get(name) for name in ("seconds", "adapter_bytes", "peak_bytes")}

    def rises(self) -> list[str]:
        """One line on the requested evaluations whose training loss rose; empty if none did."""
        records = [self._ledger.finished[key] for key in self.asked if key in self._ledger.finished]
        return rise_warnings({_named(record): record.get("loss") for record in records})

    def training_steps(self, steps: int) -> int:
        """Optimizer steps of the requested evaluations: `steps` each, fewer where stopped early."""
        stopped = self._stopped()
        return sum(stopped.get(key, steps) for key in self.asked)

    def _stopped(self) -> dict[str, int]:
        """Key -> step of evaluations that were stopped early. With early stopping on, they are not run again."""
        if not (self._config.search.runner == "ray" and self._config.search.ray.early_stopping):
            return {}
        found = {record["key"]: record.get("stopped_at") for record in self._ledger.records}
        return {key: step for key, step in found.items() if step is not None and key not in self._ledger.finished}

    def last_error(self) -> str | None:
        """The error of the last failed evaluation; None if none failed."""
        failed = [record["error"] for record in self._ledger.records if record["status"] == "failed"]
        return failed[-1] if failed else None

    def seconds(self) -> float:
        """Total seconds of the requested evaluations, over all processes."""
        return sum(self._ledger.finished[key]["seconds"] for key in self.asked if key in self._ledger.finished)

    def drop(self, keys: Collection[str]) -> None:
        """Delete the adapters of these evaluations; they are trained again if needed."""
        for key in keys:
            remove_folder(candidate_adapter(self._output, key))

    def clear(self) -> None:
        """Delete the adapters of all evaluations; the winner's is in OUTPUT/adapter."""
        remove_folder(self._output / "candidates")

    def _drop_followers(self, masks: dict[Pair, str]) -> None:
        seeds = self._config.search.seeds
        means = {
            pair: sum(self.metrics[pair, seed] for seed in seeds) / len(seeds)
            for pair in {pair for pair, _ in self.metrics}
            if all((pair, seed) in self.metrics for seed in seeds)
        }
        if not means:
            return
        leader = best_of(means, self._lower_is_better)
        for pair, seed in self.metrics:
            if masks[pair] != masks[leader]:
                remove_folder(candidate_adapter(self._output, evaluated(masks[pair], seed).key(self._config)))
