"""What a comparison asks for, by an engine that makes its metrics up."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from irdscale.compare import on_test, run
from irdscale.compare.budget import Budget, OutOfTime
from irdscale.compare.method_specs import RESTART, asked_methods
from irdscale.compare.methods import ModelFacts
from irdscale.compare.study import read_study
from irdscale.config.compare import LoraConfig
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.search.candidates import Candidate
from irdscale.search.engines import LocalEngine
from irdscale.search.ird import Outcome, Pair, ird
from irdscale.search.ledger import read_ledger
from irdscale.search.limits import reachable_sizes
from irdscale.search.mask_store import SearchMasks
from irdscale.search.runner import WorkItem
from irdscale.training.base_model import KeptBase

MEAN = "fisher.score=mean_activation"
START, MINIMUM = Pair(16, 40), Pair(4, 10)
METHODS = ["ird", "reverse", "fish_best", "fish", "fish_small", "top_samples", "bottom_samples", "random_mask"]
DENSE = ["magnitude_mask", "lora", "bitfit", "linear_probe", "full"]
SCORED = ["activation", "gem", "gallop"]
FACTS = ModelFacts(
    ["head.weight"],
    ["a.bias"],
    {"lora": 64, "sparse_lora": 24, "bitfit": 3, "linear_probe": 0, "full": 400},
    {"parameters": 400, "head": 2, "scored": 400, "scored_by": "all"},
    {"lora": 8, "sparse_lora": 3},
)


def number(text: str) -> float:
    """Between 0 and 1, the same for the same text."""
    return int.from_bytes(text.encode()[-64:], "big") % 9973 / 9973


def metric_of(candidate: Candidate) -> float:
    assert candidate.train is not None
    of = f"{candidate.mask}{candidate.lora}{candidate.train.always_train}{candidate.seed}"
    # The best learning rate of all is 0.02; on the test split it would be 0.03.
    return round(number(of) / 10 - 40 * abs(candidate.train.learning_rate - 0.02), 6)


def test_of(candidate: Candidate) -> float:
    assert candidate.train is not None
    return candidate.train.learning_rate + candidate.seed % RESTART


test_of.__test__ = False  # type: ignore[attr-defined]


class Engine:
    """Remembers what it was asked for; may be killed after some evaluations. Its clock counts what work takes.

    It runs `room` evaluations side by side.
    """

    def __init__(self, config: RunConfig, task: Any, output: Path, metric: Callable[[Candidate], Any]) -> None:
        self.given, self.metric = (config, task, output), metric
        self.asked: list[Candidate] = []
        self.tested: list[Candidate] = []
        self.left = 10**6
        self.room = 1
        self.clock, self.in_time, self.mask_seconds, self.test_seconds = 0.0, False, 0.0, 0.0
        self.made: list[str] = []

    def call(self, work: Callable[..., Any], *args: Any) -> Any:
        return work(*self.given, *args)

    def call_all(
        self,
        calls: Sequence[WorkItem],
        ended: Callable[[int, Any], None] = lambda place, result: None,
        starting: Callable[[int], None] | None = None,
    ) -> Any:
        # Test scores may share a GPU, passes that make masks may not.
        assert all(call.light is (call.work is on_test.score_on_test) for call in calls)
        return LocalEngine(*self.given, KeptBase()).call_all(calls, ended, starting)

    def evaluate(
        self,
        candidates: Sequence[Candidate],
        ended: Callable[[dict[str, Any]], None],
        starting: Callable[[Candidate], None] = lambda candidate: None,
    ) -> None:
        # In little time, complete seeds are tested before the next seed begins.
        assert self.in_time or not self.tested, "nothing may be chosen after the test split was read"
        waiting, running, refusal = list(candidates), list[tuple[float, int, Candidate]](), None
        while running or (waiting and refusal is None):
            while waiting and refusal is None and len(running) < self.room:
                try:
                    starting(waiting[0])
                except OutOfTime as stop:
                    refusal = stop
                    continue
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1
                self.asked.append(waiting[0])
                ends = self.clock + 1.0 + waiting[0].seed % RESTART
                heapq.heappush(running, (ends, len(self.asked), waiting.pop(0)))
            if running:
                self.clock, _, candidate = heapq.heappop(running)
                found = self.metric(candidate)
                ok = {"metric": found, "status": "ok"} if isinstance(found, float) else {"error": found}
                costs = {"seconds": 1.0 + candidate.seed % RESTART, "peak_bytes": 2**30 + candidate.seed % RESTART}
                ended(candidate.record(self.given[0]) | costs | ok)
        if refusal is not None:
            raise refusal


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], Engine]]:
    engine: Engine
    lower = False

    def masks(config: RunConfig, task: Any, output: Path, progress: bool, name: str) -> SearchMasks:
        engine.clock += engine.mask_seconds
        engine.made.append(name)
        how = f"{config.search.direction}-{config.search.rank_by}-{config.fisher.seed}"
        sizes, ks = reachable_sizes(START, MINIMUM)
        found = {
            Pair(s, p): f"all-{config.fisher.seed}-{p}" if s == 16 else f"{how}-{s}-{p}" for s in sizes for p in ks
        }
        return SearchMasks(START, MINIMUM, found, {"sample_gradients": 32})

    def draw(
        config: RunConfig, task: Any, output: Path, pair: Pair, progress: bool, name: str, purpose: str
    ) -> dict[str, Any]:
        return {"mask": f"{purpose}-{config.fisher.seed}", "sample_gradients": pair.samples, "seconds": 0.0}

    def tested(config: RunConfig, task: Any, output: Path, asked: list[tuple[Candidate, bool]]) -> Any:
        engine.tested += [candidate for candidate, _ in asked]
        engine.clock += engine.test_seconds
        return [(test_of(candidate), 0.01) for candidate, _ in asked]

    @contextmanager
    def running(config: RunConfig, task: Any, output: Path, progress: bool, ratio: float | None) -> Any:
        yield engine

    def task_of(config: RunConfig) -> Any:
        splits = {name: range(8) for name in ("train", "selection", "test", "trained")}
        named = {"name": "toy", "kind": "sequence-classification", "metric": "accuracy", "num_labels": 2, "origin": {}}
        return SimpleNamespace(**splits, **named, label_names=[], lower_is_better=lower, pool=None, pool_in_words=None)

    monkeypatch.setattr(run, "load_task", task_of)
    monkeypatch.setattr(run, "running", running)
    monkeypatch.setattr(run, "model_facts", lambda config, task, output, lora: FACTS)
    monkeypatch.setattr(run, "search_masks", masks)
    monkeypatch.setattr(run, "random_draw_mask", draw)
    monkeypatch.setattr(
        run, "drawn_mask", lambda config, task, output, name: (f"{config.fisher.score}-{config.fisher.seed}", 40)
    )
    monkeypatch.setattr(on_test, "score_on_test", tested)

    def compared(
        metric: Callable[[Candidate], Any] = metric_of,
        left: int = 10**6,
        smaller: bool = False,
        rounds: int = 3,
        patience: int = 2,
        search: dict[str, Any] | None = None,
        minutes: float | None = None,
        mask_seconds: float = 0.0,
        test_seconds: float = 0.0,
        room: int = 1,
        **changes: Any,
    ) -> tuple[dict[str, Any], Engine]:
        nonlocal engine, lower
        lower = smaller
        settings = {"methods": METHODS + DENSE, "learning_rates": [0.01, 0.02, 0.03], "seeds": [0, 1, 2], **changes}
        config = RunConfig.model_validate(
            {
                "model": {"path": "m"},
                "task": {"dataset": "glue/rte"},
                "fisher": {"samples": 16},
                "search": {"ratio": 0.1, "min_samples": 4, "max_rounds": rounds, "patience": patience} | (search or {}),
                "train": {"steps": 4, "batch_size": 8},
                "compare": settings,
                "output": str(tmp_path / "out"),
            }
        )
        engine = Engine(config, None, tmp_path / "out", metric)
        engine.given = config, task_of(config), tmp_path / "out"
        engine.left, engine.in_time, engine.room = left, minutes is not None, room
        engine.mask_seconds, engine.test_seconds = mask_seconds, test_seconds
        budget = None if minutes is None else Budget(minutes, 0.0, lambda: engine.clock)
        return run.run_compare(config, progress=False, budget=budget), engine

    return compared


def entries(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in result["methods"]}


def test_all_have_the_same_rates_and_as_many_evaluations(compare: Any) -> None:
    result, engine = compare()
    found = entries(result)
    assert [entry["name"] for entry in result["methods"]] == METHODS + DENSE
    searched = [one["evaluations"] for one in found["ird"]["seeds"]]
    assert all(count > 3 for count in searched)
    for name in ("fish_best", "random_mask", *DENSE):
        assert [one["evaluations"] for one in found[name]["seeds"]] == searched, name
    for name in ("fish", "fish_small", "top_samples", "bottom_samples"):
        assert [one["evaluations"] for one in found[name]["seeds"]] == [3, 3, 3], name
    assert all(entry["learning_rate"] == 0.02 for entry in result["methods"])
    assert all([of["learning_rate"] for of in entry["grid"]] == [0.01, 0.02, 0.03] for entry in result["methods"])
    keys = [candidate.key(engine.given[0]) for candidate in engine.asked]
    assert len(set(keys)) == len(keys) == result["evaluations"], "nothing is trained twice"


def test_methods_may_have_rates_of_their_own(compare: Any) -> None:
    rates = {"default": [0.01, 0.02], "lora": [0.002, 0.03]}
    result, engine = compare(learning_rates=rates, methods=["ird", "lora", "full"], equal_budget=False)
    tried = {name: {c.train.learning_rate for c in engine.asked if c.direction == name} for name in entries(result)}
    assert tried == {"ird": {0.01, 0.02}, "lora": {0.002, 0.03}, "full": {0.01, 0.02}}
    assert {name: entry["learning_rate"] for name, entry in entries(result).items()} == {
        "ird": 0.02,
        "lora": 0.03,
        "full": 0.02,
    }
    assert [one["learning_rate"] for one in entries(result)["lora"]["grid"]] == [0.002, 0.03]
    assert result["learning_rates"] == [0.01, 0.02, 0.002, 0.03]
    assert {one["evaluations"] for one in entries(result)["lora"]["seeds"]} == {2}


def search_alone(engine: Engine, repetition: int, how: str) -> Outcome:
    """The search of one repetition by itself, at the rate that is kept."""
    train = engine.given[0].train.model_copy(update={"learning_rate": 0.02})

    def score(pair: Pair, seed: int) -> float:
        of = f"all-{repetition}" if pair.samples == 16 else f"{how}-trace-{repetition}-{pair.samples}"
        return metric_of(Candidate(f"{of}-{pair.params}", pair, seed, None, "", train))

    return ird(START, MINIMUM, [repetition], 3, 2, lambda _, wanted: [score(*one) for one in wanted])


def test_other_scores_have_one_mask_of_all_samples(compare: Any) -> None:
    result, engine = compare(methods=["ird", "fish", *SCORED, "mean"], variants={"mean": ["activation", MEAN]})
    found = entries(result)
    for name in (*SCORED, "mean"):
        assert [one["evaluations"] for one in found[name]["seeds"]] == [3, 3, 3], "as many as FISH"
        assert [one["samples"] for one in found[name]["seeds"]] == [16, 16, 16]
        score = "mean_activation" if name == "mean" else name
        assert {(c.mask, c.seed) for c in engine.asked if c.direction == name} == {
            (f"{score}-{s}", s) for s in range(3)
        }
    # A training sees 4 x 8 samples; three forward passes count as one gradient.
    assert found["gem"]["fine_tunings"] == found["gallop"]["fine_tunings"] == pytest.approx(1 + 16 / 32)
    assert found["activation"]["fine_tunings"] == pytest.approx(1 + 5 / 32, abs=1e-3)


def test_scores_by_mean_gradients_need_a_sampled_or_given_label() -> None:
    config = {"model": {"path": "m"}, "task": {"dataset": "glue/rte"}, "fisher": {"objective": "expected"}}
    # Rival scores are compared where they are named.
    assert not {*SCORED} & {method.name for method in asked_methods(RunConfig.model_validate(config))}
    asked = RunConfig.model_validate({**config, "compare": {"methods": ["ird", "gem"]}})
    message = (
        r"compare.methods: gem: fisher.score: found 'gem' with objective 'expected', whose mean gradient is 0; exp"
    )
    with pytest.raises(InputError, match=message):
        asked_methods(asked)


def test_searches_side_by_side_are_those_of_one_alone(compare: Any) -> None:
    result, engine = compare()
    for name in ("ird", "reverse"):
        for one in entries(result)[name]["seeds"]:
            outcome = search_alone(engine, one["seed"], name)
            assert (one["samples"], one["params"]) == (outcome.best.samples, outcome.best.params)
            assert one["selection"] == outcome.mean
            assert one["evaluations"] == 3 + outcome.evaluations - 1


def test_draws_are_as_many_as_a_search_evaluates_with_those_that_fail(compare: Any) -> None:
    def failing(candidate: Candidate) -> Any:
        fails = candidate.direction == "ird" and candidate.pair == Pair(8, 40)
        return "RuntimeError: no" if fails else metric_of(candidate)

    result, engine = compare(failing, methods=["ird", "fish_best", "random_mask"])
    found = entries(result)
    searched = [one["evaluations"] for one in found["ird"]["seeds"]]
    # FISH's first draw is where IRD starts.
    for name, first in (("fish_best", 0), ("random_mask", 1)):
        assert [one["evaluations"] for one in found[name]["seeds"]] == searched
        masks = {c.mask for c in engine.asked if c.direction == name}
        assert len(masks) == sum(count - 3 + first for count in searched), "each is drawn anew"


def test_draws_have_the_sizes_that_ird_evaluated(compare: Any) -> None:
    _, engine = compare(methods=["ird", "fish_best", "full"], equal_budget=False)
    for seed in (0, 1, 2):
        sizes: dict[str, list[Pair]] = {"ird": [], "fish_best": []}
        for candidate in engine.asked:
            if candidate.seed == seed and candidate.direction in sizes and candidate.train.learning_rate == 0.02:
                sizes[candidate.direction].append(candidate.pair)
        # The start is a draw of all samples, for both.
        assert sizes["fish_best"] == [pair for pair in sizes["ird"] if pair != START]
    assert {c.direction for c in engine.asked if c.seed >= RESTART} == set()


def test_new_starts_and_draws_are_new(compare: Any) -> None:
    _, engine = compare()
    for name in (*DENSE, "random_mask"):
        keys = {(c.mask, c.seed) for c in engine.asked if c.direction == name and c.train.learning_rate == 0.02}
        assert len(keys) == sum(c.direction == name and c.train.learning_rate == 0.02 for c in engine.asked)
        assert len({mask for mask, _ in keys}) == {"random_mask": len(keys), "magnitude_mask": 3}.get(name, 1)


def test_what_is_chosen_is_best_on_selection_and_the_test_comes_last(compare: Any) -> None:
    result, engine = compare(smaller=True)
    found = entries(result)
    # Smaller is better: the rates farthest from 0.02 win, and each seed's smallest metric.
    assert found["full"]["learning_rate"] != 0.02
    for one in found["random_mask"]["seeds"]:
        own = [
            metric_of(c)
            for c in engine.asked
            if c.direction == "random_mask"
            and c.seed == one["seed"]
            and c.train.learning_rate == found["random_mask"]["learning_rate"]
        ]
        assert one["selection"] == min(own)
    tested = [candidate.key(engine.given[0]) for candidate in engine.tested]
    assert len(tested) == len(set(tested)), "each is measured on the test split once"
    assert len(tested) <= 3 * len(METHODS + DENSE)
    for entry in result["methods"]:
        rate = entry["learning_rate"]
        assert [one["test"] for one in entry["seeds"]] == [rate + one["seed"] for one in entry["seeds"]]
    assert found["ird"]["difference"] is None
    assert found["fish"]["difference"]["n"] == 3


def test_a_rate_that_fails_is_not_kept_and_a_method_that_fails_is_told(compare: Any) -> None:
    def failing(candidate: Candidate) -> Any:
        assert candidate.train is not None
        if candidate.direction == "lora" or (candidate.direction == "full" and candidate.train.learning_rate == 0.02):
            return "TrainingError: the loss is nan"
        return metric_of(candidate)

    result, _ = compare(failing)
    found = entries(result)
    assert found["full"]["learning_rate"] in (0.01, 0.03)
    assert {of["learning_rate"]: of["selection"] for of in found["full"]["grid"]}[0.02] is None
    lora = found["lora"]
    assert lora["learning_rate"] is None
    assert lora["test"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert {one["error"] for one in lora["seeds"]} == {"TrainingError: the loss is nan"}
    assert found["bitfit"]["test"]["n"] == 3


def test_killed_it_goes_on_and_more_methods_and_seeds_are_added(compare: Any, tmp_path: Path) -> None:
    whole, engine = compare()
    everything = [candidate.key(engine.given[0]) for candidate in engine.asked]
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    made: list[str] = []
    for left in (0, 7, 40, 1000):
        try:
            result, engine = compare(left=left)
        except KeyboardInterrupt:
            engine = None
        records = read_ledger(tmp_path / "out" / "ledger.jsonl")
        made = [record["key"] for record in records]
    assert sorted(made) == sorted(everything), "nothing is lost, nothing done twice"
    assert without_seconds(result) == without_seconds(whole)
    again, engine = compare()
    assert again == result
    assert not engine.asked
    more, engine = compare(seeds=[0, 1, 2, 3], methods=["ird", "fish", "again"], variants={"again": ["ird"]})
    assert {candidate.seed for candidate in engine.asked} == {3}
    assert entries(more)["again"]["seeds"] == entries(more)["ird"]["seeds"]
    assert entries(more)["ird"]["seeds"][:3] == entries(whole)["ird"]["seeds"]


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("seconds", "costs", "config")}


def test_the_report_reads_what_was_written(compare: Any, tmp_path: Path) -> None:
    result, _ = compare()
    assert json.loads(json.dumps(read_study(tmp_path / "out"))) == json.loads(json.dumps(result))
    claims = {claim["claim"]: claim for claim in result["claims"]}
    assert {"IRD over FISH", "IRD over reverse IRD", "IRD over FISH, best of draws"} < set(claims)
    # IRD, its draws and random masks have as many trainings.
    assert len(set(claims["FISH, best of draws over random mask"]["trainings"])) == 1
    found = entries(result)["fish"]["difference"]
    assert claims["IRD over FISH"]["mean"] == (-found["mean"] if result["task"]["lower_is_better"] else found["mean"])


def test_costs_count_trainings_and_sample_gradients(compare: Any) -> None:
    result, _ = compare(equal_budget=False)
    found = entries(result)
    # A training sees 4 x 8 samples; IRD's masks take 32 gradients, FISH's 16.
    searched = sum(one["evaluations"] - 2 for one in found["ird"]["seeds"]) / 3
    assert found["ird"]["fine_tunings"] == pytest.approx(searched + 32 / 32, abs=1e-3)
    assert found["fish"]["fine_tunings"] == pytest.approx(1 + 16 / 32)
    assert found["fish_small"]["fine_tunings"] == pytest.approx(1 + 4 / 32)
    assert found["full"]["fine_tunings"] == 1


def test_half_a_mask_and_matrices_share_a_budget(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, engine = compare(methods=["ird", "sparse_lora", "fish_layerwise", "supertuning_bottom"])
    (lora,) = {c.lora for c in engine.asked if c.direction == "sparse_lora"}
    assert lora == LoraConfig(rank=3)
    # Half of 40 entries of all samples, and 24 parameters of matrices.
    of_lora = {c.pair for c in engine.asked if c.direction == "sparse_lora"}
    assert of_lora == {Pair(16, 20 + 24)}
    assert {c.mask for c in engine.asked if c.direction == "sparse_lora"} == {f"all-{seed}-20" for seed in range(3)}
    found = entries(result)
    assert found["sparse_lora"]["fine_tunings"] == found["fish_layerwise"]["fine_tunings"]
    assert [entry["label"] for entry in result["methods"]] == [
        "IRD",
        "sparse + LoRA",
        "FISH, layerwise",
        "Super-Tuning, bottom",
    ]
    assert found["sparse_lora"]["what"].endswith(
        "LoRA matrices (PEFT) for the other half, rank 3, in all linear layers"
    )
    assert {c.mask for c in engine.asked if c.direction == "supertuning_bottom"} == {
        f"small_magnitude-{seed}" for seed in range(3)
    }
    # Where a search does not reach half the entries, a pass makes that mask.
    monkeypatch.setitem(globals(), "MINIMUM", Pair(4, 30))
    _, engine = compare(methods=["sparse_lora"])
    assert {c.mask for c in engine.asked} == {f"pool-{seed}" for seed in range(3)}


def test_measured_costs_are_those_of_the_tested_trainings(compare: Any) -> None:
    result, _ = compare(methods=["fish", "lora"])
    expected = {"seconds": 2.0, "adapter_bytes": None, "peak_bytes": 2**30 + 2}
    assert result["costs"] == {"fish": expected, "lora": expected}


@pytest.mark.parametrize(
    ("changes", "tight"),
    [
        # Where one round evaluates its three candidates there is nothing to spare.
        ({"methods": ["ird", "fish", "top_samples", "random_mask", "lora", "full"], "rounds": 1}, True),
        ({"methods": ["ird", "fish", "top_samples", "full"], "equal_budget": False, "rounds": 1}, True),
        ({"methods": ["ird", "reverse", "fish_best", "lora"], "rounds": 1}, True),
        ({"rounds": 1, "seeds": [0]}, True),
        ({}, False),
        ({"equal_budget": False}, False),
        ({"methods": ["fish", "random_mask"]}, True),
        # A method has the budget of the search, whatever its own rounds would be.
        ({"methods": ["ird", "short"], "variants": {"short": ["full", "search.max_rounds=1"]}}, False),
        ({"methods": ["ird", "short"], "variants": {"short": ["fish_best", "search.max_rounds=1"]}}, False),
        ({"methods": ["ird", "long"], "variants": {"long": ["ird", "search.max_rounds=3"]}, "rounds": 1}, False),
        ({"methods": ["ird", "fish", *SCORED], "rounds": 1}, True),
        ({"methods": ["both", "full"], "variants": {"both": ["ird", "search.max_rounds=1"]}}, True),
    ],
)
def test_the_bar_is_never_overrun(
    changes: dict[str, Any], tight: bool, compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: dict[str, list[float]] = {}

    @contextmanager
    def bar(description: str, total: int, enabled: bool) -> Iterator[Any]:
        assert description not in bars
        shown = bars[description] = [total, 0]

        def advance(n: float = 1, note: str = "", earlier: bool = False, **more: Any) -> None:
            shown[1] += n

        yield advance

    monkeypatch.setattr(run, "bar", bar)
    monkeypatch.setattr(on_test, "bar", bar)
    _, engine = compare(patience=9, **changes)
    total, done = bars["Evaluations"]
    assert done <= total
    assert not tight or done == total
    # Methods with the same mask share a test score.
    assert bars["Test scores"] == [len(engine.tested)] * 2


@pytest.mark.parametrize(("most", "fewest"), [(1, 8), (2, 4), (9, 4)])
def test_the_fewest_samples_of_a_search_are_those_of_its_rounds(compare: Any, most: int, fewest: int) -> None:
    assert compare(rounds=most)[0]["fewest"] == fewest


def test_early_stopping_is_refused() -> None:
    asked = {"runner": "ray", "ray": {"early_stopping": True}}
    config = RunConfig.model_validate({"model": {"path": "m"}, "task": {"dataset": "glue/rte"}, "search": asked})
    with pytest.raises(InputError, match=r"search\.ray\.early_stopping: found true; expected false"):
        run.run_compare(config)
