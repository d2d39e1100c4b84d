"""Whole searches on a toy: what they write, what they read, and that nothing stops them for good."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale import Mask, load_adapter
from irdscale.config.loader import load_config
from irdscale.errors import InputError
from irdscale.models.build import build_model
from irdscale.search import candidates, masks, run
from irdscale.search.ird import Pair
from irdscale.search.ledger import Ledger, read_ledger
from irdscale.search.limits import reachable_sizes
from irdscale.search.masks import search_masks
from irdscale.search.run import run_search
from irdscale.sparse import sparse_state
from irdscale.tasks import load_task
from irdscale.training import mask_passes
from irdscale.training.evaluate import evaluate_model
from tests.search.toy import essence, write_config
from tests.search.toy import finished as evaluations_of
from tests.spawned import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, dict[str, Any]]:
    """An undisturbed search and its output folder."""
    config = load_config(write_config(folder))
    return Path(config.output), run_search(config, progress=False)


def test_result_and_files(finished: tuple[Path, dict[str, Any]], folder: Path) -> None:
    output, result = finished
    config = load_config(folder / "toy.yaml")
    assert json.loads((output / "result.json").read_text()) == result
    records = read_ledger(output / "ledger.jsonl")
    ok = [r for r in records if r["status"] == "ok"]
    assert len({r["key"] for r in ok}) == len(ok) == len(records)
    assert {r["round"] for r in ok} - {None} <= set(range(len(result["path"])))
    assert result["sample_gradients"] <= 2 * config.fisher.samples
    assert all(set(r["loss"]) == {"began", "ended", "rose"} for r in ok)
    assert len(result["warnings"]) == any(r["loss"]["rose"] for r in ok)
    best = result["best"]
    start = Pair(16, round(0.05 * result["model"]["parameters"]))
    sizes, ks = reachable_sizes(start, Pair(4, round(0.01 * result["model"]["parameters"])))
    assert result["path"][0] | {"metric": 0} == {"round": 0, "samples": 16, "params": start.params, "metric": 0}
    assert best["samples"] in sizes
    assert best["params"] in ks
    means: dict[tuple[int, int], list[float]] = {}
    by_mask = {(r["mask"], r["seed"]): r["metric"] for r in ok}
    stored = json.loads((output / "fisher/masks.json").read_text())["masks"]
    for s, p, mask in stored:
        if (mask, 0) in by_mask and (mask, 1) in by_mask:
            means[s, p] = [by_mask[mask, 0], by_mask[mask, 1]]
    assert best["metric"] == max(sum(m) / 2 for (s, p), m in means.items() if (s, p) in _visited(result, ok))
    assert Mask.load(output / best["mask"]).k == best["params"]
    assert sorted(p.name for p in output.iterdir()) == [
        "adapter",
        "config.yaml",
        "fisher",
        "ledger.jsonl",
        "masks",
        "result.json",
        "trainings",
    ]
    traces = json.loads((output / "fisher/traces.json").read_text())
    ranked = [traces["trace"][i] for i in traces["order"]]
    assert ranked == sorted(ranked, reverse=True)
    assert len(set(traces["row"])) == 16
    task = load_task(config)
    model = build_model(config, task, 0)[0]
    chosen = [task.train[i] for i in range(len(task.train)) if task.train[i]["row"] in traces["row"]]
    with torch.no_grad():
        losses = {row["row"]: float(model(**task.collate([row])).loss) for row in chosen}
    assert traces["loss"] == pytest.approx([losses[row] for row in traces["row"]], rel=1e-5)


def _visited(result: dict[str, Any], ok: list[dict[str, Any]]) -> set[tuple[int, int]]:
    return {(r["samples"], r["params"]) for r in ok} | {(s["samples"], s["params"]) for s in result["path"]}


def test_the_adapter_gives_the_stated_metrics(finished: tuple[Path, dict[str, Any]], folder: Path) -> None:
    output, result = finished
    config = load_config(folder / "toy.yaml")
    task = load_task(config)
    model = load_adapter(build_model(config, task, seed=9)[0], output / "adapter")
    chosen = max(result["best"]["seeds"], key=lambda s: s["metric"])
    assert evaluate_model(model, task, task.selection, 64)["accuracy"] == chosen["metric"]
    assert evaluate_model(model, task, task.test, 64)["accuracy"] == chosen["test_metric"]
    share = chosen["test_metric"]
    assert chosen["test_error"] == pytest.approx((share * (1 - share) / len(task.test)) ** 0.5)
    assert result["best"]["test_error"] == sum(s["test_error"] for s in result["best"]["seeds"]) / 2
    assert sparse_state(model).k == result["best"]["params"]


def test_a_second_run_trains_nothing(
    finished: tuple[Path, dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "running", None)
    assert run_search(load_config(folder / "toy.yaml"), progress=False) == finished[1]


def test_the_search_reads_the_test_split_only_at_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_config(folder), [f"output={folder / 'watched'}", "search.max_rounds=1"])
    events: list[str] = []
    real_append = Ledger.append

    def append(self: Ledger, record: dict[str, Any]) -> None:
        events.append("evaluation")
        real_append(self, record)

    def watching(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def watch(model: Any, task: Any, split: Any, size: int) -> Any:
            events.append("test" if split is task.test else "selection")
            return evaluate(model, task, split, size)

        return watch

    monkeypatch.setattr(Ledger, "append", append)
    for name in ("evaluate_model", "evaluate_with_errors"):
        monkeypatch.setattr(candidates, name, watching(getattr(candidates, name)))
    run_search(config, progress=False)
    first = events.index("test")
    assert "evaluation" in events[:first]
    assert set(events[first:]) == {"test"}
    assert "test" not in events[:first]


@pytest.mark.parametrize("direction", ["reverse", "random"])
def test_directions(folder: Path, direction: str) -> None:
    overrides = [f"output={folder / direction}", f"search.direction={direction}", "search.max_rounds=1"]
    result = run_search(load_config(write_config(folder), overrides), progress=False)
    traces = json.loads((folder / direction / "fisher/traces.json").read_text())
    ranked = [traces["trace"][i] for i in traces["order"]]
    if direction == "reverse":
        assert ranked == sorted(ranked)
        assert result["sample_gradients"] == 32
    else:
        assert ranked not in (sorted(ranked), sorted(ranked, reverse=True))
        assert all(t > 0 for t in ranked)
        assert result["sample_gradients"] == 16, "a shuffle needs no traces"


@pytest.mark.parametrize(("score", "gradients"), [("saliency", 32), ("activation", 16), ("magnitude", 16)])
def test_scores(folder: Path, score: str, gradients: int) -> None:
    overrides = [f"output={folder / score}", f"fisher.score={score}", "search.max_rounds=1", "search.seeds=[0]"]
    result = run_search(load_config(write_config(folder), overrides), progress=False)
    assert result["sample_gradients"] == gradients
    stored = json.loads((folder / score / "fisher/masks.json").read_text())["masks"]
    masks = {mask for _, p, mask in stored if p == result["path"][0]["params"]}
    assert (len(masks) == 1) is (score == "magnitude"), "weights do not depend on the samples"
    assert bool(result["reused"]) is (score == "magnitude")


def test_changed_configurations_are_refused_by_name(finished: tuple[Path, dict[str, Any]], folder: Path) -> None:
    before = (finished[0] / "result.json").read_bytes()
    changed = load_config(folder / "toy.yaml", ["train.steps=9", "search.seeds=[0]"])
    with pytest.raises(InputError, match=r"search.seeds: \[0, 1\] -> \[0\]; train.steps: 24 -> 9") as error:
        run_search(changed, progress=False)
    assert "\n" not in str(error.value)
    assert (finished[0] / "result.json").read_bytes() == before
    other = folder / "foreign"
    other.mkdir()
    with Ledger(other / "ledger.jsonl") as ledger:
        ledger.append(read_ledger(finished[0] / "ledger.jsonl")[0])
    with pytest.raises(InputError, match="holds a ledger but no config"):
        run_search(load_config(folder / "toy.yaml", [f"output={other}"]), progress=False)


def test_bad_input_leaves_nothing_behind(folder: Path) -> None:
    for override, message in (
        ("search.ratio=0.00001", r"search.ratio: found 1e-05, which gives 0 of \d+ parameters; expected 1 to"),
        ("fisher.include=[nothing]", "found no parameter"),
        ("train.always_train=[nothing]", "'nothing' matches no parameter"),
        ("fisher.samples=65", "fisher.samples: found 65; expected at most 64"),
    ):
        overrides = ["search.min_ratio=null", override]
        config = load_config(write_config(folder, output=str(folder / "bad")), overrides)
        with pytest.raises(InputError, match=message):
            run_search(config, progress=False)
        assert not (folder / "bad").exists(), override
    write_config(folder)


def test_a_failing_candidate_is_recorded_and_the_round_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_config(folder), [f"output={folder / 'lame'}", "search.max_rounds=1"])
    real, lame = candidates.fine_tune, []

    def fine_tune(model: Any, *args: Any, **options: Any) -> None:
        if sparse_state(model).k == round(0.05 * 8482) // 2 and len(lame) < 2:
            lame.append(1)
            raise RuntimeError("out of memory\nwith details")
        real(model, *args, **options)

    monkeypatch.setattr(candidates, "fine_tune", fine_tune)
    result = run_search(config, progress=False)
    failed = [r for r in read_ledger(folder / "lame/ledger.jsonl") if r["status"] == "failed"]
    assert [r["error"] for r in failed] == ["RuntimeError: out of memory"] * len(lame)
    assert len(lame) == 2
    assert (failed[0]["samples"], failed[0]["params"]) not in {(p["samples"], p["params"]) for p in result["pareto"]}
    assert result["best"]["test_metric"] is not None


def test_masks_of_a_run_that_died_before_it_began_are_not_taken_for_others(folder: Path) -> None:
    output = folder / "dead"
    config = load_config(write_config(folder), [f"output={output}", "search.max_rounds=1"])
    masks = search_masks(config, load_task(config), output, progress=False)
    other = load_config(write_config(folder), [f"output={output}", "search.max_rounds=1", "fisher.samples=8"])
    again = search_masks(other, load_task(other), output, progress=False)
    assert masks.start.samples == 16
    assert again.start.samples == 8
    assert search_masks(other, load_task(other), output, progress=False) == again


def test_samples_for_masks_are_of_the_population(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, wanted = folder / "shaped", "task.pool={copies: {of: 2, share: 0.9}}"
    config = load_config(write_config(folder), [f"output={output}", wanted])
    task = load_task(config)
    scored = []
    real = mask_passes.sample_gradients

    def watch(*args: Any) -> Any:
        scored.append(real(*args))
        return scored[-1]

    monkeypatch.setattr(mask_passes, "sample_gradients", watch)
    search_masks(config, task, output, progress=False)
    masks.random_draw_mask(config, task, output, Pair(16, 40), progress=False)
    pool, fish = (samples.dataset[:] for samples in scored)
    assert pool["row"] != fish["row"]
    for drawn in (pool, fish):
        # Nine of ten samples of the population are copies of the same two.
        assert sum(drawn["altered"]) >= 8
        assert len({row for row, copy in zip(drawn["row"], drawn["altered"]) if copy}) == 2
    traces = json.loads((output / "fisher/traces.json").read_text())
    assert traces["altered"] == pool["altered"]
    assert traces["row"] == pool["row"]


def search_again(rank: int, world: int, toy: str, output: str) -> None:
    config = load_config(toy, [f"output={output}"])
    Path(f"{output}.ready").touch()
    run_search(config, progress=False)


def test_killed_at_random_moments_it_ends_with_the_same_winner(
    finished: tuple[Path, dict[str, Any]], folder: Path
) -> None:
    """SIGKILL a real process again and again until a run comes to its end."""
    output, generator, kills = folder / "killed", random.Random(4), 0
    ready = Path(f"{output}.ready")
    seen: dict[str, float] = {}
    while True:
        (process,) = run_ranks(search_again, 1, str(folder / "toy.yaml"), str(output), join=False).processes
        while not ready.exists():
            assert process.is_alive()
            time.sleep(0.02)
        ready.unlink()
        process.join(generator.uniform(0.5, 6) if kills < 4 else 300)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        if process.exitcode != 0:
            # A kill seldom hits the middle of a write, so its traces are laid too.
            for half in ("masks/.abc.123/mask.json", ".adapter.456/adapter.json", "candidates/.key.old.789/x"):
                (output / half).parent.mkdir(parents=True, exist_ok=True)
                (output / half).write_text("{")
        now = evaluations_of(output)
        assert seen.items() <= now.items(), "a finished evaluation is neither lost nor run again"
        seen = now
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert kills >= 2
    assert not list(output.rglob(".*")), "nothing half-written stays"
    assert essence(json.loads((output / "result.json").read_text())) == essence(finished[1])
    assert evaluations_of(output) == evaluations_of(finished[0])
