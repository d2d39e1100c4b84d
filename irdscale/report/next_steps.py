"""What to do after a search, as its result suggests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irdscale.report.commands import command
from irdscale.report.statistics import ENOUGH_SEEDS, interval, seed_range
from irdscale.report.verdict import is_fish_mask
from irdscale.utils.formats import counted


def next_steps(result: Mapping[str, Any], output: Path) -> tuple[str, list[str]]:
    """A paragraph on what to do next, and the commands for it in the order of the sentences."""
    config = output / "config.yaml"
    if result["best"]["test_metric"] is None:
        text = "The winner has no test metric. Read the errors below, remove their cause, and run the search again."
        return text, [command("search", config)]
    sentences, commands = _against_floor(result, output)
    if not sentences:
        sentences, commands = _against_fish(result, output)
        for step in (_more_rounds(result, output), _larger(result, output)):
            sentences += step[0]
            commands += step[1]
    return " ".join([*sentences, "The section Use it measures, applies and exports the winner as it is."]), commands


def seed_interval(differences: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean of differences by seed and its 95 % t interval; None with fewer than three."""
    found = interval(differences)
    return None if found["low"] is None else (found["mean"], found["low"], found["high"])


def gains(best: Mapping[str, Any], other: Mapping[str, Any], lower_is_better: bool) -> list[float]:
    """Gain of the winner over another entry on the test split by seed, positive if the winner is better."""
    sign = -1.0 if lower_is_better else 1.0
    pairs = zip(best["seeds"], other["seeds"], strict=True)
    return [sign * (a["test_metric"] - b["test_metric"]) for a, b in pairs]


def _against_floor(result: Mapping[str, Any], output: Path) -> tuple[list[str], list[str]]:
    """Advice if the winner does not beat the head alone or the base model."""
    names = {"linear_probe": "the head alone", "base": "the base model"}
    for key, name in names.items():
        other = result["baseline"].get(key)
        if other is None or other["test_metric"] is None:
            continue
        if min(gains(result["best"], other, result["task"]["lower_is_better"])) <= 0:
            longer, words = _longer(result)
            text = f"The winner does not beat {name} for every seed: first find a training that does, {words}, or with "
            text += "another train.learning_rate. Until then a comparison of masks says little."
            more = (f"output={_beside(output, 'longer')}", *longer)
            return [text], [command("search", output / "config.yaml", *more)]
    return [], []


def _longer(result: Mapping[str, Any]) -> tuple[list[str], str]:
    train = result["config"].get("train", {})
    if train.get("steps"):
        return [f"train.steps={3 * train['steps']}"], f"for instance with {3 * train['steps']:,} steps"
    epochs = 3 * (train.get("epochs") or 1)
    return [f"train.epochs={epochs:g}"], f"for instance with {epochs:g} epochs"


def _against_fish(result: Mapping[str, Any], output: Path) -> tuple[list[str], list[str]]:
    best, fish = result["best"], result["baseline"]["fish_random"]
    if is_fish_mask(result) or fish.get("same_mask_as_best"):
        text = (
            "The winner kept all samples of the pool" if not fish.get("same_mask_as_best") else "Both masks are equal"
        )
        text += ": train one FISH mask of this size, without a search, or compare the methods to see whether fewer, "
        text += "ranked samples are better for other seeds."
        return [text], [_one_mask(result, output), _compare(result, output)]
    if fish["test_metric"] is None:
        text = "There is no mask of random samples to compare with. Compare the methods before you rely on the ranking."
        return [text], [_compare(result, output)]
    found = gains(best, fish, result["task"]["lower_is_better"])
    spread = seed_interval(found)
    shown = "" if spread is None else f" (gain {spread[0]:+.4f}, 95 % interval {spread[1]:+.4f} to {spread[2]:+.4f})"
    low, high = seed_range(found)
    if low > 0 and len(found) >= ENOUGH_SEEDS:
        return [f"The winner beats random samples beyond the chance of the seeds{shown}: use it."], []
    sure = "" if len(found) >= ENOUGH_SEEDS else f", which {counted(len(found), 'seed')} cannot prove"
    if high < 0:
        text = f"Random samples gave the better mask{shown}{sure}: if a comparison confirms it, use one FISH mask of "
        text += "this size, which needs no search. Compare the methods"
    elif low > 0:
        text = f"The winner beats random samples{shown}{sure}: compare the methods"
    else:
        text = f"The seeds do not tell the winner from random samples{shown}: compare the methods"
    alone = [_one_mask(result, output)] if high < 0 else []
    return [f"{text} with {ENOUGH_SEEDS} seeds."], [*alone, _compare(result, output)]


def _one_mask(result: Mapping[str, Any], output: Path) -> str:
    """The command that trains one FISH mask of the winner's size."""
    best = result["best"]
    share = f"search.ratio={best['params'] / result['model']['parameters']:.6g}"
    folder = f"output={_beside(output, 'fish')}"
    return command("train", output / "config.yaml", folder, f"fisher.samples={best['samples']}", share)


def _compare(result: Mapping[str, Any], output: Path) -> str:
    seeds = ",".join(map(str, range(max(ENOUGH_SEEDS, len(result["best"]["seeds"])))))
    head = ["linear_probe"] if result["model"]["head"] else []
    methods = ",".join(["ird", "fish", "top_samples", *head])
    more = (f"output={_beside(output, 'compare')}", f"compare.methods=[{methods}]", f"compare.seeds=[{seeds}]")
    return command("compare", output / "config.yaml", *more)


def _more_rounds(result: Mapping[str, Any], output: Path) -> tuple[list[str], list[str]]:
    """Advice if the last round that the search was allowed was its best."""
    last, best = result["path"][-1], result["best"]
    allowed = result["config"]["search"].get("max_rounds")
    ended = allowed is not None and last["round"] >= allowed > 0
    if not ended or (last["samples"], last["params"]) != (best["samples"], best["params"]):
        return [], []
    text = f"The last of {allowed} rounds was the best: more rounds may find a smaller mask that is as good."
    more = (f"output={_beside(output, 'rounds')}", f"search.max_rounds={allowed + 3}")
    return [text], [command("search", output / "config.yaml", *more)]


def _larger(result: Mapping[str, Any], output: Path) -> tuple[list[str], list[str]]:
    """Advice if the largest mask was the best."""
    first, best, ratio = result["path"][0], result["best"], result["config"]["search"].get("ratio")
    if ratio is None or len(result["pareto"]) < 2 or best["params"] != first["params"]:
        return [], []
    ratio = min(2 * ratio, 0.5)
    text = f"The largest number of parameters was the best: search.ratio={ratio:g} may be better still."
    more = (f"output={_beside(output, 'larger')}", f"search.ratio={ratio:g}")
    return [text], [command("search", output / "config.yaml", *more)]


def _beside(output: Path, name: str) -> Path:
    """A folder beside the output of the search."""
    absolute = output.absolute()
    return absolute.with_name(f"{absolute.name}-{name}")
