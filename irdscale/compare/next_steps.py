"""What to do after a comparison, as its result suggests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irdscale.compare.claims import HOLDS, claim_on, claims_of
from irdscale.compare.grid import wider_grid
from irdscale.compare.verdict import failures, method_named, reference_of
from irdscale.report.commands import command
from irdscale.report.statistics import ENOUGH_SEEDS

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
    if study.get("missing"):
        text = "Seeds are missing: the first command goes on with them, after all evaluations so far."
        found = _use(study, output)
        return " ".join([*sentences, text, found[0]]), [_again(study, output), *found[1]]
    seeds = max(ENOUGH_SEEDS, len(study["seeds"]))
    wider = wider_grid(study)
    if wider or len(study["seeds"]) < ENOUGH_SEEDS:
        first = [f"{ENOUGH_SEEDS} seeds"] if len(study["seeds"]) < ENOUGH_SEEDS else []
        more = " and ".join([*first, *(["more learning rates"] if wider else [])])
        sentences.append(f"Compare with {more}: the same folder keeps what is done already.")
        changes = [f"compare.seeds=[{','.join(map(str, _seeds_in_all(study['seeds'], seeds)))}]"]
        changes += [wider] if wider else []
        commands.append(_again(study, output, *changes))
    found = _use(study, output)
    return " ".join([*sentences, found[0]]), [*commands, *found[1]]


def widening(study: dict[str, Any], output: Path) -> str | None:
    """The command that compares with more learning rates where a method chose one at an edge; None if none did."""
    wider = wider_grid(study)
    return None if wider is None else _again(study, output, wider)


def _again(study: dict[str, Any], output: Path, *changes: str) -> str:
    return command("compare", output / "config.yaml", f"output={output.absolute()}", *changes)


def _seeds_in_all(seeds: list[int], count: int) -> list[int]:
    """The seeds, and further ones up to this number."""
    further = (seed for seed in range(count + len(seeds)) if seed not in seeds)
    return [*seeds, *(next(further) for _ in range(count - len(seeds)))]


def _use(study: dict[str, Any], output: Path) -> tuple[str, list[str]]:
    """Which method to train: the reference, or the cheapest that it does not beat."""
    reference = reference_of(study)
    fish, best = method_named(study, "fish"), _best(study)
    if best is None:
        return "", []
    chosen, why = best, f"{best['label']} has the best mean on the selection split"
    if reference["name"] == "ird" and fish is not None and best in (reference, fish):
        claim = claim_on(claims_of(study), "ird", "fish")
        if claim is not None and claim["verdict"] == HOLDS:
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
