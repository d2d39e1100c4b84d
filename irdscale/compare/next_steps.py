"""What to do after a comparison, as its result suggests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irdscale.compare.verdict import ENOUGH_SEEDS, failures, gain, method_named, reference_of, side
from irdscale.report.commands import command

# Methods that a verb of irdscale trains: name -> verb and its changes.
_VERBS = {"ird": ("search", []), "reverse": ("search", ["search.direction=reverse"]), "fish": ("train", [])}


def next_steps(study: dict[str, Any], output: Path) -> tuple[str, list[str]]:
    """A paragraph on what to do next, and the commands for it in the order of the sentences."""
    reference = reference_of(study)
    if reference["test"]["mean"] is None:
        text = f"{reference['label']} failed for every seed. Remove the cause, listed above, and compare again."
        return text, [_again(study, output)]
    sentences, commands = [], []
    failed = len(failures(study))
    if failed:
        sentences.append(f"{failed} training(s) failed; remove their cause before you rely on the other methods.")
    seeds = max(ENOUGH_SEEDS, len(study["seeds"]))
    rates = _wider(study)
    if rates or len(study["seeds"]) < ENOUGH_SEEDS:
        first = [f"{ENOUGH_SEEDS} seeds"] if len(study["seeds"]) < ENOUGH_SEEDS else []
        more = " and ".join([*first, *(["more learning rates"] if rates else [])])
        sentences.append(f"Compare with {more}: the same folder keeps what is done already.")
        changes = [f"compare.seeds=[{','.join(map(str, _more_seeds(study['seeds'], seeds)))}]"]
        changes += [f"compare.learning_rates=[{','.join(f'{rate:g}' for rate in rates)}]"] if rates else []
        commands.append(_again(study, output, *changes))
    found = _use(study, output)
    return " ".join([*sentences, found[0]]), [*commands, *found[1]]


def _again(study: dict[str, Any], output: Path, *changes: str) -> str:
    return command("compare", output / "config.yaml", f"output={output.absolute()}", *changes)


def _more_seeds(seeds: list[int], count: int) -> list[int]:
    """The seeds, and further ones up to this number."""
    further = (seed for seed in range(count + len(seeds)) if seed not in seeds)
    return [*seeds, *(next(further) for _ in range(count - len(seeds)))]


def _wider(study: dict[str, Any]) -> list[float]:
    """The learning rates with further ones at an end that a method chose; empty if none did."""
    rates = sorted(study["learning_rates"])
    chosen = {method["learning_rate"] for method in study["methods"]}
    if len(rates) < 2 or not chosen & {rates[0], rates[-1]}:
        return []
    below = [float(f"{rates[0] / 3:.1g}")] if rates[0] in chosen else []
    above = [float(f"{rates[-1] * 3:.1g}")] if rates[-1] in chosen else []
    return [*below, *rates, *above]


def _use(study: dict[str, Any], output: Path) -> tuple[str, list[str]]:
    """Which method to train: the reference, or the cheapest that it does not beat."""
    reference = reference_of(study)
    fish, best = method_named(study, "fish"), _best(study)
    if best is None:
        return "", []
    chosen, why = best, f"{best['label']} has the best mean on the selection split"
    if reference["name"] == "ird" and fish is not None and best in (reference, fish):
        where = side(gain(study, fish))
        if where > 0:
            chosen, why = reference, "IRD is better than one FISH mask beyond the chance of the seeds"
        else:
            chosen, why = fish, "nothing shows that the search is better than one FISH mask, which costs less"
    name = chosen["name"]
    if name not in _VERBS:
        return f"For now, use {chosen['label']}: {why}.", []
    verb, changes = _VERBS[name]
    folder = output.absolute().with_name(f"{output.absolute().name}-{name}")
    rate = [] if chosen["learning_rate"] is None else [f"train.learning_rate={chosen['learning_rate']:g}"]
    line = command(verb, output / "config.yaml", f"output={folder}", *rate, *changes)
    return f"For now, use {chosen['label']}: {why}. The last command trains it and keeps its adapter.", [line]


def _best(study: dict[str, Any]) -> dict[str, Any] | None:
    """The method with the best mean on the selection split."""
    known = [method for method in study["methods"] if method["selection"]["mean"] is not None]
    sign = -1 if study["task"]["lower_is_better"] else 1
    return max(known, key=lambda method: sign * method["selection"]["mean"], default=None)
