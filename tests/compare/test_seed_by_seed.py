"""Comparisons in little time: what is started, in which order, what is missing, and that calls add up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from irdscale.compare import budget as budgets
from irdscale.compare.budget import Budget, OutOfTime, TimedEngine
from irdscale.compare.method_specs import RESTART
from irdscale.compare.missing import missing_notes, print_missing, progress_lines
from irdscale.compare.next_steps import next_steps
from irdscale.compare.report import write_files
from irdscale.compare.study import read_study
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.search.candidates import Candidate
from irdscale.search.ird import Pair
from irdscale.search.ledger import read_ledger
from tests.compare import test_run
from tests.compare.fake import around, study, write_study
from tests.compare.test_run import metric_of, without_seconds

compare = test_run.compare
FEW: dict[str, Any] = {"methods": ["ird", "fish_best", "random_mask", "lora"], "learning_rates": [0.01, 0.02]}
# Seconds kept for the report.
KEPT = 0.9


def turning(candidate: Candidate) -> float:
    """The first seed's best rate is 0.01, that of all seeds is 0.02."""
    assert candidate.train is not None
    rate, first = candidate.train.learning_rate, candidate.seed % RESTART == 0
    return metric_of(candidate) + (0.5 if first and rate == 0.01 else 0)


def failing(candidate: Candidate) -> Any:
    return "TrainingError: the loss is nan" if candidate.direction == "lora" else metric_of(candidate)


@pytest.mark.parametrize(("metric", "room"), [(metric_of, 1), (turning, 4), (failing, 1)])
def test_calls_add_up_to_one_without_a_deadline(metric: Any, room: int, compare: Any, tmp_path: Path) -> None:
    whole, _ = compare(metric, **FEW)
    alone = {1: compare(metric, **FEW, seeds=[0])[0]}
    shutil.rmtree(tmp_path / "out")
    minutes, sizes = 1.0 / room, []
    for _ in range(20):
        result, engine = compare(metric, **FEW, minutes=minutes, room=room)
        assert engine.clock <= 60 * minutes * KEPT
        assert engine.asked, "every call gets on"
        sizes.append(len(result["seeds"]))
        if not result.get("missing"):
            break
        assert [one["seed"] for one in result["missing"]["seeds"]] == [0, 1, 2][sizes[-1] :]
        if sizes[-1] in alone:
            found = {key: value for key, value in result.items() if key != "missing"}
            assert without_seconds(found) == without_seconds(alone[sizes[-1]])
            assert read_study(tmp_path / "out")["missing"] == result["missing"]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 3
    assert len(sizes) > 2
    assert without_seconds(result) == without_seconds(whole)
    finished = [one["key"] for one in read_ledger(tmp_path / "out" / "ledger.jsonl") if one["status"] == "ok"]
    assert len(set(finished)) == len(finished), "nothing is done twice"
    again, engine = compare(metric, **FEW, minutes=minutes)
    assert again == result
    assert not engine.asked


def test_a_seed_is_complete_before_the_next_one_begins(compare: Any) -> None:
    _, engine = compare(**FEW, minutes=10)
    seeds = [candidate.seed % RESTART for candidate in engine.asked]
    assert seeds == sorted(seeds)
    assert set(seeds) == {0, 1, 2}


def test_a_rate_is_the_best_of_the_complete_seeds(compare: Any) -> None:
    first = compare(turning, **FEW, seeds=[0])[0]
    assert {entry["learning_rate"] for entry in first["methods"]} == {0.01}
    whole = compare(turning, **FEW, minutes=10)[0]
    assert {entry["learning_rate"] for entry in whole["methods"]} == {0.02}


def test_what_failed_is_not_tried_again_by_the_same_call(compare: Any) -> None:
    _, engine = compare(failing, **FEW, minutes=10)
    tried = [(c.seed, c.train.learning_rate) for c in engine.asked if c.direction == "lora"]
    assert len(tried) == len(set(tried)) == 3 * 2


def test_an_evaluation_that_would_end_late_is_not_started(compare: Any, tmp_path: Path) -> None:
    # Trainings of seed 0 take 1 second. The report keeps a tenth of 6 seconds.
    result, engine = compare(**FEW, minutes=0.1)
    assert engine.clock == len(engine.asked) == 5
    assert result["seeds"] == result["methods"] == []
    assert not (tmp_path / "out" / "compare.json").exists()
    assert result["missing"]["done"] == 5
    (first, *_) = result["missing"]["seeds"]
    found = {one["name"]: one["done"] for one in first["methods"]}
    assert found == {"ird": 2, "fish_best": 2, "random_mask": 2, "lora": 1}, "IRD and FISH share their first"


def test_side_by_side_each_start_is_asked_for(compare: Any) -> None:
    # Trainings of seed 0 take 1 second. The report keeps a tenth of 3 seconds.
    result, engine = compare(**FEW, minutes=0.05, room=2)
    assert engine.clock == 2
    assert result["missing"]["done"] == len(engine.asked) == 4, "of 6 that are handed over together"
    assert result["missing"]["next"].endswith("for which 1.0 s are expected, and 0.70 s are left")


def test_seconds_beside_an_evaluation_are_expected_too(compare: Any, tmp_path: Path) -> None:
    compare(**FEW, minutes=0.1)
    file = tmp_path / "out" / "fisher" / "seconds.json"
    measured = json.loads(file.read_text())
    assert measured[budgets.BESIDE] == 0
    file.write_text(json.dumps(measured | {budgets.BESIDE: 4.5}))
    assert compare(**FEW, minutes=0.1)[1].asked == []
    file.write_text(json.dumps(measured | {budgets.BESIDE: 4.4}))
    # The one that starts is faster, and that is kept.
    assert len(compare(**FEW, minutes=0.1)[1].asked) == 5


def test_a_pass_that_would_end_late_is_not_started(compare: Any) -> None:
    result, engine = compare(**FEW, minutes=1, mask_seconds=20.0)
    assert engine.made == ["ird-0"], "of 54 seconds, too few are left for those of the second seed"
    assert result["missing"]["next"].startswith("masks of ird-1")
    before = result["seeds"]
    # The masks that were made are read without asking.
    result, engine = compare(**FEW, minutes=0.3)
    assert (result["seeds"], engine.made) == (before, ["ird-0"])
    assert result["missing"]["next"] == "masks of ird-1, for which 20 s are expected, and 16 s are left"


def test_test_scores_are_asked_for_with_the_training_that_a_lost_adapter_takes(compare: Any) -> None:
    # All evaluations of the first seed take less than 54 seconds, its four test scores do not.
    result, engine = compare(**FEW, minutes=1, test_seconds=30.0)
    assert len(engine.tested) == 1
    assert result["seeds"] == []
    assert result["missing"]["seeds"][0] == {"seed": 0, "methods": []}
    assert result["missing"]["next"].startswith("the test metric of random_mask, seed 0")
    assert "Missing for seed 0: test metrics." in missing_notes(result)


@pytest.mark.parametrize(("direction", "seconds"), [("lora", 30.0), ("own", 30.0), ("ird", 4.0), ("full", 30.0)])
def test_expected_are_the_longest_of_the_kind_else_of_any(direction: str, seconds: float, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"model": {"path": "m"}, "task": {"dataset": "glue/rte"}, "output": str(tmp_path)}
    )
    of_records = [("lora", 9.0), ("own", 30.0), ("ird", 4.0), ("ird", 3.0)]
    ledger: Any = SimpleNamespace(records=[{"direction": one, "seconds": took} for one, took in of_records])
    candidate = Candidate("a", Pair(4, 10), 0, None, direction, config.train)
    kinds = {"lora": "lora", "own": "lora", "ird": "ird", "full": "full"}
    asked: list[Candidate] = []

    def evaluate(candidates: list[Candidate], ended: Any, starting: Any) -> None:
        for one in candidates:
            starting(one)
            asked.append(one)

    inner: Any = SimpleNamespace(evaluate=evaluate)
    for left, starts in ((seconds, True), (seconds - 0.01, False)):
        # Of one minute, 6 seconds are kept for the report.
        budget = Budget(1, 0.0, lambda left=left: 54.0 - left)  # type: ignore[misc]
        engine = TimedEngine(inner, budget, ledger, config, kinds)
        if starts:
            engine.evaluate([candidate], lambda record: None)
            assert asked == [candidate]
        else:
            with pytest.raises(OutOfTime):
                engine.evaluate([candidate], lambda record: None)
    assert len(asked) == 1


def test_rank_0_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(1, 0.0, lambda: 10.0)
    budget.ask(44.0, "it fits")
    with pytest.raises(OutOfTime):
        budget.ask(44.1, "it does not")
    for flag in (True, False):
        monkeypatch.setattr(budgets, "broadcast_flag", lambda own, flag=flag: flag)
        if flag:
            budget.ask(1000.0, "rank 0's clock has more time")
        else:
            with pytest.raises(OutOfTime):
                budget.ask(1.0, "rank 0's clock has less")


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_minutes_are_above_0(minutes: float) -> None:
    with pytest.raises(InputError, match=r"--minutes: found .*; expected minutes above 0"):
        Budget(minutes)


MISSING = {
    "done": 57,
    "of": 240,
    "exact": False,
    "next": "lora, seed 2, for which 40 s are expected, and 12 s are left",
    "seeds": [
        {"seed": 2, "methods": [{"name": "lora", "label": "LoRA", "done": 1, "most": 3}]},
        {"seed": 3, "methods": [{"name": name, "label": name, "done": 0, "most": 3} for name in ("IRD", "LoRA")]},
        {"seed": 4, "methods": []},
    ],
}


def test_the_report_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = study({"ird": around(0.7, 2), "lora": around(0.6, 2)}) | {"missing": MISSING}
    written = write_files(write_study(tmp_path, partial))
    lines = [
        "Missing for seed 2: LoRA (1 of at most 3 evaluations).",
        "Missing for seed 3: IRD, LoRA.",
        "Missing for seed 4: test metrics.",
        "The learning rates are chosen by the mean over these seeds",
        "this is what seeds 0, 1 found",
        "lora, seed 2, for which 40 s are expected",
    ]
    for kind in ("markdown", "html"):
        text = Path(written[kind]).read_text()
        assert all(line in text for line in lines), kind
    assert missing_notes(study({"ird": around(0.7, 2)})) == []
    assert "the first command goes on" in next_steps(partial, tmp_path)[0]
    assert progress_lines(partial) == ["57 of at most 240 evaluations are done; the same command goes on"]
    print_missing(partial | {"seeds": []})
    assert capsys.readouterr().out.splitlines()[-1] == progress_lines(partial)[0]
