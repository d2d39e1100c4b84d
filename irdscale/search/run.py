"""`irdscale search`: masks, rounds, baselines, and the winner's test score and adapter."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irdscale.config.schema import RunConfig, training_steps
from irdscale.distributed.ranks import broadcast_flag, failing_together, rank_and_world, write_json_once
from irdscale.errors import RunError
from irdscale.runs.folder import held, search_part
from irdscale.search.candidates import Candidate, score_base, score_on_test
from irdscale.search.engines import running
from irdscale.search.folder import open_ledger, refuse_changes
from irdscale.search.ird import Outcome, Pair, StartError, ird
from irdscale.search.limits import most_evaluations
from irdscale.search.mask_store import SearchMasks
from irdscale.search.masks import random_draw_mask, search_masks, stored_masks
from irdscale.search.runner import Engine, Runner, evaluated
from irdscale.tasks import load_task, tell_classes
from irdscale.training.result import task_facts, versions
from irdscale.training.trackers import require_trackers
from irdscale.utils.files import read_json
from irdscale.utils.progress import bar

if TYPE_CHECKING:
    from irdscale.tasks import Task

log = logging.getLogger(__name__)


def run_search(config: RunConfig, progress: bool = True, overwrite: bool = False) -> dict[str, Any]:
    """Run an IRD search, or go on with an interrupted one.

    The search reads the train and the selection split. It reads the test split once, for the winner and the baselines,
    after all choices. Writes config.yaml, fisher/, masks/, ledger.jsonl, adapter/ and result.json into `config.output`.
    Collective if torch.distributed is initialised: the ranks share Fisher passes and train each candidate together.
    Rank 0 writes, and all ranks return the result.

    Args:
        overwrite: whether to remove earlier files of irdscale from the folder.

    Returns:
        The contents of result.json.

    Raises:
        InputError: the configuration does not fit the data or the model; the output folder holds other work (names the
            configuration, data or model that differs) or is in use.
        RunError: no candidate could be evaluated, or the output cannot be written.
    """
    output, parts = Path(config.output), {"search": search_part(config)}
    result_file = output / "result.json"
    with failing_together():
        require_trackers(config)
        if not overwrite:
            refuse_changes(config, output)
    with held(config, overwrite) as folder:
        if broadcast_flag(result_file.exists() and not overwrite):
            folder.claim(partial(load_task, config), parts)
            log.info("%s holds this search, finished; --overwrite runs it again", output)
            result: dict[str, Any] = read_json(result_file, "result of a search")
            return result
        with failing_together():
            task = load_task(config)
        folder.claim(task, parts)
        tell_classes(task, progress and rank_and_world()[0] == 0)
        with running(config, task, output, progress) as engine:
            return _search(config, task, engine, output, progress)


def _search(config: RunConfig, task: Task, engine: Engine, output: Path, progress: bool) -> dict[str, Any]:
    masks = stored_masks(config, output) or engine.call(search_masks, progress)
    with open_ledger(config, output) as ledger:
        most = most_evaluations(masks.start, masks.minimum, config.search.max_rounds, len(config.search.seeds))
        with bar("Evaluations", most, enabled=progress and rank_and_world()[0] == 0) as advance:
            runner = Runner(config, ledger, engine, output, advance, task.lower_is_better)
            outcome = _rounds(config, runner, masks, task.lower_is_better)
            evaluations, reused, train_seconds = len(runner.asked), runner.reused, runner.seconds()
            baselines = _run_baselines(config, engine, runner, masks, outcome.best, progress)
        started = time.perf_counter()
        best_mask, fish = masks.masks[outcome.best], baselines["fish_random"]
        best = {
            **asdict(outcome.best),
            "mask": f"masks/{best_mask}",
            "adapter": "adapter",
            **_selection(config, runner, best_mask),
        }
        others = [(Path(entry["mask"]).name if "mask" in entry else None, entry) for entry in baselines.values()]
        _test(engine, [(best_mask, best), *others], task.lower_is_better)
        if not masks.facts["head"]:
            baselines["base"] = _base(config, *engine.call(score_base))
        seconds = {
            "fisher": masks.facts["seconds"],
            "train": round(train_seconds, 2),
            "baseline": round(runner.seconds() - train_seconds + fish["seconds"], 2),
            "test": round(time.perf_counter() - started, 2),
        }
        seconds["total"] = round(sum(seconds.values()), 2)
        result = {
            "best": best,
            "pareto": [
                {**asdict(pair), "metric": outcome.means[pair], "mask": f"masks/{masks.masks[pair]}"}
                for pair in outcome.pareto
            ],
            "path": [{"round": s.round, **asdict(s.pair), "metric": s.mean} for s in outcome.path],
            "stop": outcome.stop,
            "baseline": baselines,
            "sample_gradients": masks.facts["sample_gradients"],
            "baseline_sample_gradients": fish["sample_gradients"],
            "evaluations": evaluations,
            "reused": reused,
            "training_steps": runner.training_steps(training_steps(config.train, len(task.trained))),
            "seconds": seconds,
            "warnings": runner.rises(),
            **what_was_searched(config, task, masks.facts),
        }
        write_json_once(output / "result.json", result)
        runner.clear()
    return result


def _rounds(config: RunConfig, runner: Runner, masks: SearchMasks, lower_is_better: bool) -> Outcome:
    """Run the rounds.

    Raises:
        RunError: the start failed (with its error).
    """
    try:
        outcome = ird(
            masks.start,
            masks.minimum,
            config.search.seeds,
            config.search.max_rounds,
            config.search.patience,
            partial(runner.evaluate_round, masks=masks.masks),
            lower_is_better,
        )
    except StartError as error:
        raise RunError(f"{error}: {runner.last_error()}") from None
    if outcome.all_failed:
        return replace(outcome, stop=f"{outcome.stop}: {runner.last_error()}")
    return outcome


def what_was_searched(config: RunConfig, task: Task, model: dict[str, Any]) -> dict[str, Any]:
    """The part of a result on its task, model and configuration.

    Args:
        model: "parameters", "scored", "head" (entries) and "scored_by" (text).
    """
    return {
        "task": task_facts(task),
        "model": {
            "path": config.model.path,
            **{k: model[k] for k in ("parameters", "scored", "head", "scored_by")},
        },
        "direction": config.search.direction,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
    }


def _run_baselines(
    config: RunConfig, engine: Engine, runner: Runner, masks: SearchMasks, best: Pair, progress: bool
) -> dict[str, dict[str, Any]]:
    """Train the baselines: a mask of random samples at the winner's (s, p), and the head alone if it is new."""
    draw = engine.call(random_draw_mask, best, progress)
    baselines: dict[str, dict[str, Any]] = {
        "fish_random": {
            "samples": best.samples,
            "params": best.params,
            "mask": f"masks/{draw['mask']}",
            "same_mask_as_best": draw["mask"] == masks.masks[best],
            "sample_gradients": draw["sample_gradients"],
            "seconds": draw["seconds"],
        }
    }
    asked: list[tuple[str, str | None, Pair, str]] = [("fish_random", draw["mask"], best, "random")]
    # A model without a new head has no linear probe.
    if masks.facts["head"]:
        baselines["linear_probe"] = {"params": 0}
        asked.append(("linear_probe", None, Pair(0, 0), "probe"))
    seeds = config.search.seeds
    runner.evaluate([Candidate(mask, pair, seed, None, how) for _, mask, pair, how in asked for seed in seeds])
    for name, mask, _, _ in asked:
        baselines[name] |= _selection(config, runner, mask)
    return baselines


def _base(config: RunConfig, selection: float, test: float, error: float) -> dict[str, Any]:
    """The untrained base model, the same for every seed; only for a model without a new head."""
    found = {"metric": selection, "test_metric": test, "test_error": error}
    seeds = [{"seed": seed, **found} for seed in config.search.seeds]
    return {"params": 0, **found, "seeds": seeds, "error": None}


def _selection(config: RunConfig, runner: Runner, mask: str | None) -> dict[str, Any]:
    """Selection metric of each seed and its mean; None and the error if a seed failed."""
    seeds: list[dict[str, Any]] = [
        {"seed": seed, "metric": runner.metric(evaluated(mask, seed))} for seed in config.search.seeds
    ]
    errors = [runner.error(evaluated(mask, entry["seed"])) for entry in seeds if entry["metric"] is None]
    return {"metric": None if errors else _mean(seeds, "metric"), "seeds": seeds, "error": (errors or [None])[0]}


def _test(engine: Engine, entries: list[tuple[str | None, dict[str, Any]]], lower_is_better: bool) -> None:
    """Add test metrics and standard errors to entries of `_selection`; keep the first entry's best adapter.

    The error of a mean over seeds is the mean of their errors, because all seeds share the test samples.
    """
    scored = [(mask, entry) for mask, entry in entries if entry["metric"] is not None]
    asked = []
    for mask, entry in scored:
        best = min if lower_is_better else max
        chosen = best(entry["seeds"], key=lambda seed: seed["metric"])["seed"]
        asked += [
            (evaluated(mask, one["seed"]), entry is entries[0][1] and one["seed"] == chosen) for one in entry["seeds"]
        ]
    found = iter(engine.call(score_on_test, asked))
    for _, entry in entries:
        entry["test_metric"] = entry["test_error"] = None
    for _, entry in scored:
        for one in entry["seeds"]:
            one["test_metric"], one["test_error"] = next(found)
        for name in ("test_metric", "test_error"):
            entry[name] = _mean(entry["seeds"], name)


def _mean(seeds: list[dict[str, Any]], name: str) -> float:
    return sum(entry[name] for entry in seeds) / len(seeds)
