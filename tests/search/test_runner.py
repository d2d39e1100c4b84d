"""What a runner asks its engine for: nothing that the ledger holds, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from irdscale.config.schema import RunConfig
from irdscale.search.candidates import Candidate
from irdscale.search.ird import Pair
from irdscale.search.ledger import Ledger
from irdscale.search.runner import Runner, WorkItem

A, B, C = Pair(8, 4), Pair(4, 4), Pair(8, 2)
MASKS = {A: "a", B: "b", C: "c"}


class Engine:
    """Says what it was asked for, and ends everything as it is told to."""

    def __init__(self, config: RunConfig, end: Callable[[Candidate], dict[str, Any]]) -> None:
        self.config, self.end = config, end
        self.asked: list[tuple[Pair, int]] = []

    def call(self, work: Callable[..., Any], *args: Any) -> Any:
        raise AssertionError

    def call_all(
        self, calls: Sequence[WorkItem], ended: Callable[[int, Any], None] = lambda place, result: None
    ) -> Any:
        raise AssertionError

    def evaluate(self, candidates: Sequence[Candidate], ended: Callable[[dict[str, Any]], None]) -> None:
        self.asked = [(c.pair, c.seed) for c in candidates]
        for candidate in candidates:
            ended(candidate.record(self.config) | {"seconds": 1.0} | self.end(candidate))


def config_of(**ray: Any) -> RunConfig:
    search = {"seeds": [0, 1], "runner": "ray", "ray": ray, "min_samples": 1}
    return RunConfig.model_validate({"model": {"path": "m"}, "task": {"dataset": "glue/rte"}, "search": search})


def test_only_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    config = config_of()
    engine = Engine(config, lambda c: {"status": "ok", "metric": float(c.pair.samples)})
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        runner = Runner(config, ledger, engine, tmp_path)
        assert runner.evaluate_round(0, [(A, 0), (A, 1)], MASKS) == [8.0, 8.0]
        # B has the mask of A in this search: two pairs, one evaluation.
        same = {**MASKS, B: "a"}
        assert runner.evaluate_round(1, [(B, 0), (B, 1), (C, 0), (C, 1)], same) == [8.0] * 4
        assert engine.asked == [(C, 0), (C, 1)]
        assert (runner.reused, len(runner.asked), runner.seconds()) == (2, 4, 4.0)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        engine = Engine(config, lambda c: {})
        again = Runner(config, ledger, engine, tmp_path)
        assert again.evaluate_round(0, [(A, 0), (A, 1)], MASKS) == [8.0, 8.0]
        assert engine.asked == []


def test_what_was_stopped_early_is_not_run_again(tmp_path: Path) -> None:
    config = config_of(early_stopping=True)
    stopped = {"error": "stopped early at step 5, with 0.2500", "stopped_at": 5}
    for _ in range(2):
        engine = Engine(config, lambda c: stopped if c.pair == B else {"status": "ok", "metric": 1.0})
        with Ledger(tmp_path / "ledger.jsonl") as ledger:
            runner = Runner(config, ledger, engine, tmp_path)
            assert runner.evaluate_round(1, [(A, 0), (B, 0)], MASKS) == [1.0, None]
            assert runner.training_steps(20) == 25
            assert runner.last_error() == "stopped early at step 5, with 0.2500"
    assert engine.asked == []
    for _ in range(2):
        # The same words without the field are an error like any other.
        engine = Engine(config, lambda c: {"error": stopped["error"]})
        with Ledger(tmp_path / "ledger.jsonl") as ledger:
            assert Runner(config, ledger, engine, tmp_path).evaluate_round(1, [(C, 0)], MASKS) == [None]
        assert engine.asked == [(C, 0)]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        late = Engine(config_of(), lambda c: {"status": "ok", "metric": 2.0})
        assert Runner(config_of(), ledger, late, tmp_path).evaluate_round(1, [(B, 0)], MASKS) == [2.0]
