"""The verdict of a search: sentences that claim no more than the numbers show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from irdscale.report.statistics import ENOUGH_SEEDS, FEWEST_SEEDS, seed_range
from irdscale.utils.formats import percent


def with_error(value: float | None, error: float | None, absent: str = "-") -> str:
    """A metric with its standard error, if known: 0.8730 ± 0.0150."""
    if value is None:
        return absent
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def verdict(result: dict[str, Any]) -> list[str]:
    """The winner, and its comparison on the test split with random samples and with the head alone, in sentences."""
    best, model, task = result["best"], result["model"], result["task"]
    sentences = [
        f"The search chose {best['params']:,} of the model's {model['parameters']:,} parameters "
        f"({percent(best['params'] / model['parameters'])}) by the Fisher information of {best['samples']} samples"
        + (f", and trained them with a new head of {model['head']:,} parameters." if model["head"] else ".")
        + f" It chose from {model['scored_by']}."
    ]
    if best["test_metric"] is None:
        return [*sentences, "It has no test metric."]
    error = ""
    if best["test_error"] is not None:
        error = f" Its standard error over the {task['test']:,} test samples is {best['test_error']:.4f}."
    sentences.append(f"On the test split its {task['metric']} is {best['test_metric']:.4f}{_over(best)}.{error}")
    baseline = result["baseline"]
    sign = -1 if task["lower_is_better"] else 1
    if is_fish_mask(result):
        sentences.append(_fish_against(best, baseline["fish_random"]))
    else:
        sentences.append(_against(best, baseline["fish_random"], "random samples (FISH, the same s and p)", sign))
    if "linear_probe" in baseline:
        sentences.append(_against(best, baseline["linear_probe"], "the head alone (linear probe)", sign))
    elif "base" in baseline:
        sentences.append(_against(best, baseline["base"], "the base model", sign))
    else:
        sentences.append("The checkpoint contains its head, so there is no linear probe to compare with.")
    return sentences


def is_fish_mask(result: Mapping[str, Any]) -> bool:
    """Whether the samples of the winner's mask are a random draw: none of the pool was dropped, or by shuffling."""
    return bool(result["direction"] == "random" or result["best"]["samples"] == result["path"][0]["samples"])


def _fish_against(best: dict[str, Any], other: dict[str, Any]) -> str:
    """The comparison of a winner that is a FISH mask with the FISH mask of another draw."""
    text = f"Its {best['samples']:,} samples were drawn at random, and no ranking dropped any of them"
    text += ": its mask is a FISH mask, and this result says nothing about the ranking."
    if other["test_metric"] is None or other["same_mask_as_best"]:
        return text
    difference = best["test_metric"] - other["test_metric"]
    figures = f"{other['test_metric']:.4f}; difference {difference:+.4f}"
    return f"{text} Another draw of as many samples gave {figures}, which is chance of the draw."


def _over(entry: dict[str, Any]) -> str:
    seeds = len(entry["seeds"])
    return ", for one seed" if seeds == 1 else f", the mean over {seeds} seeds"


def _against(best: dict[str, Any], other: dict[str, Any], name: str, sign: int) -> str:
    if other["test_metric"] is None:
        why = f": {other['error']}" if other["error"] else ""
        return f"There is no test metric of {name}{why}."
    if other.get("same_mask_as_best"):
        return f"There is no comparison with {name}: both have the same mask."
    pairs = zip(best["seeds"], other["seeds"], strict=True)
    differences = [a["test_metric"] - b["test_metric"] for a, b in pairs]
    mean = best["test_metric"] - other["test_metric"]
    figures = f"{other['test_metric']:.4f}; difference {mean:+.4f}"
    if mean == 0:
        return f"That is the same as {name} ({figures})."
    word = "better" if sign * mean > 0 else "worse"
    if len(differences) == 1:
        return f"That is {word} than {name} ({figures}), but one seed cannot tell a difference from chance."
    spread = f"{figures}, by seed {min(differences):+.4f} to {max(differences):+.4f}"
    (low, high), agree = seed_range(differences), " for every seed"
    if len(differences) >= FEWEST_SEEDS:
        spread, agree = f"{spread}; 95 % interval {low:+.4f} to {high:+.4f}", ""
    if low <= 0 <= high:
        return f"It cannot be distinguished from {name} ({spread})."
    few = "; with so few seeds, this is a hint, not a proof" if len(differences) < ENOUGH_SEEDS else ""
    return f"That is {word} than {name}{agree} ({spread}){few}."
