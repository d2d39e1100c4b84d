"""The book-keeping of a search: what was asked for, what the ledger holds already, and what its engine has to run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from irdscale.config.schema import RunConfig
from irdscale.search.candidates import Candidate, candidate_adapter, remove_folder
from irdscale.search.ird import Pair, best_of
from irdscale.search.ledger import stopped_at
from irdscale.search.shared import SharedLedger
from irdscale.training.loss_trend import said_of_rises

T = TypeVar("T")


def evaluated(mask: str | None, seed: int) -> Candidate:
    """The candidate that names an evaluation of a search, whichever pair asked for it."""
    return Candidate(mask, Pair(0, 0), seed, None, "")


@dataclass(frozen=True)
class WorkItem:
    """`work(config, task, output, *args)`.

    Attributes:
        config: in the place of the run's own; of the same model and task.
        light: takes no more memory than a trial, with which it may share a GPU.
    """

    work: Callable[..., Any]
    args: tuple[Any, ...] = ()
    config: RunConfig | None = None
    light: bool = False


def _named(record: dict[str, Any]) -> str:
    return f"{record['samples']} samples, {record['params']} parameters, seed {record['seed']} ({record['key'][:8]})"


class Engine(Protocol):
    """Where candidates and Fisher passes run."""

    def call(self, work: Callable[..., T], *args: Any) -> T:
        """Run `work(config, task, output, *args)` on the ranks that share Fisher passes; the first one's result."""

    def call_all(
        self, calls: Sequence[WorkItem], ended: Callable[[int, Any], None] = lambda place, result: None
    ) -> list[Any]:
        """The results of calls, which may run at the same time, in their order.

        Args:
            ended: takes the place and the result of each as soon as it has ended.
        """

    def evaluate(self, candidates: Sequence[Candidate], ended: Callable[[dict[str, Any]], None]) -> None:
        """Evaluate candidates with distinct keys, and hand over the record of each when it has ended."""


class Runner:
    """Evaluates (mask, seed) candidates and journals them; what the ledger holds is not run again.

    Attributes:
        asked: keys of the evaluations that this search needs, in the order in which they were first asked for.
        reused: how often an evaluation was asked for again, by another pair with the same mask.
        metrics: (pair, seed) -> selection metric of every candidate of the search that ended well.
    """

    def __init__(
        self,
        config: RunConfig,
        ledger: SharedLedger,
        engine: Engine,
        output: Path,
        advance: Callable[..., None] | None = None,
        lower_is_better: bool = False,
    ) -> None:
        self._config, self._ledger, self._engine, self._output = config, ledger, engine, output
        self._advance = advance or (lambda n=1, note="", **_: None)
        self._lower_is_better = lower_is_better
        # Of an earlier run: they say nothing of how fast this one is.
        self._earlier = frozenset(ledger.finished)
        self.asked: list[str] = []
        self.reused = 0
        self.metrics: dict[tuple[Pair, int], float] = {}

    def evaluate_round(
        self, round_number: int, wanted: list[tuple[Pair, int]], masks: dict[Pair, str]
    ) -> list[float | None]:
        """Evaluate the candidates of a round; None for one that failed. Keeps the leader's adapters, drops the rest."""
        direction = self._config.search.direction
        metrics = self.evaluate([Candidate(masks[pair], pair, seed, round_number, direction) for pair, seed in wanted])
        for (pair, seed), metric in zip(wanted, metrics, strict=True):
            if metric is not None:
                self.metrics[pair, seed] = metric
        self._drop_followers(masks)
        return metrics

    def evaluate(self, wanted: Sequence[Candidate]) -> list[float | None]:
        """The selection metric of each candidate, from the ledger or by training it; None for one that failed."""
        ended_before = self._ledger.finished.keys() | self._stopped().keys()
        missing: dict[str, Candidate] = {}
        for candidate in wanted:
            key = candidate.key(self._config)
            if key in self.asked:
                self.reused += 1
            else:
                self.asked.append(key)
            if key in ended_before or key in missing:
                self._advance(note=str(candidate), **({"earlier": True} if key in self._earlier else {}))
            else:
                missing[key] = candidate

        def ended(record: dict[str, Any]) -> None:
            self._ledger.append(record)
            self._advance(note=str(missing[record["key"]]))

        if missing:
            self._engine.evaluate(list(missing.values()), ended)
        return [self.metric(candidate) for candidate in wanted]

    def metric(self, candidate: Candidate) -> float | None:
        """The selection metric of a finished evaluation; None if it is not among them."""
        record = self._ledger.finished.get(candidate.key(self._config))
        return None if record is None else record["metric"]

    def error(self, candidate: Candidate) -> str | None:
        """What the last failed try of an evaluation died of."""
        key = candidate.key(self._config)
        failed = [record["error"] for record in self._ledger.records if record["key"] == key]
        return failed[-1] if failed else None

    def trend(self, candidate: Candidate) -> dict[str, Any] | None:
        """Where the loss of a finished evaluation began and ended; None where that is not known."""
        record = self._ledger.finished.get(candidate.key(self._config), {})
        return record.get("loss")

    def rises(self) -> list[str]:
        """One line on the asked evaluations whose loss ended above where it began; none where there is none."""
        records = [self._ledger.finished[key] for key in self.asked if key in self._ledger.finished]
        return said_of_rises({_named(record): record.get("loss") for record in records})

    def training_steps(self, steps: int) -> int:
        """Optimizer steps of the asked evaluations, of `steps` each but for those that were stopped early."""
        stopped = self._stopped()
        return sum(stopped.get(key, steps) for key in self.asked)

    def _stopped(self) -> dict[str, int]:
        """Key -> step of the evaluations that were stopped early, where that is wanted; they are not run again."""
        if not (self._config.search.runner == "ray" and self._config.search.ray.early_stopping):
            return {}
        found = {record["key"]: stopped_at(record) for record in self._ledger.records}
        return {key: step for key, step in found.items() if step is not None and key not in self._ledger.finished}

    def last_error(self) -> str | None:
        """What the evaluation that failed last died of."""
        failed = [record["error"] for record in self._ledger.records if record["status"] == "failed"]
        return failed[-1] if failed else None

    def seconds(self) -> float:
        """Seconds that the asked evaluations took, in whichever process."""
        return sum(self._ledger.finished[key]["seconds"] for key in self.asked if key in self._ledger.finished)

    def drop(self, candidate: Candidate) -> None:
        """Drop the adapter of a finished evaluation; who needs it trains it again."""
        remove_folder(candidate_adapter(self._output, candidate.key(self._config)))

    def drop_all_but(self, keys: Collection[str]) -> None:
        """Drop the adapters of all finished evaluations but these."""
        for key in self._ledger.finished:
            if key not in keys:
                remove_folder(candidate_adapter(self._output, key))

    def clear(self) -> None:
        """Drop the adapters of all evaluations; the winner's has its own place."""
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
                self.drop(evaluated(masks[pair], seed))
