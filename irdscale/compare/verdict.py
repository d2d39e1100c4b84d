"""Conclusions of a comparison in words, which claim no more than its intervals."""

from __future__ import annotations

from typing import Any

from irdscale.compare.claims import HOLDS, TOO_FEW, claim_on, claims_of
from irdscale.compare.grid import edge_notes, rates_in_words
from irdscale.compare.method_specs import FEW, SEARCHES
from irdscale.config.compare import spelled_out
from irdscale.config.kinds import METRIC_RANGES
from irdscale.report.statistics import ANY, ENOUGH_SEEDS, FEWEST_SEEDS, as_gain, paired_methods
from irdscale.utils.formats import number

# Options that change a search's rounds, but not the mask of its fewest samples.
_WAY = ("search.max_rounds=", "search.patience=")


def method_named(study: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The method with this name; None if there is none."""
    return next((method for method in study["methods"] if method["name"] == name), None)


def reference_of(study: dict[str, Any]) -> dict[str, Any]:
    """The method with which all others are compared."""
    return next(method for method in study["methods"] if method["name"] == study["reference"])


def gain(study: dict[str, Any], method: dict[str, Any] | None) -> dict[str, Any] | None:
    """The reference's paired gain over a method on the test split, positive if the reference is better.

    Returns:
        {"mean", "low", "high", "n"}; None if no seed has both.
    """
    difference = method["difference"] if method else None
    if difference is None or difference["mean"] is None:
        return None
    return as_gain(difference, study["task"]["lower_is_better"])


def side(found: dict[str, Any] | None) -> int:
    """1 if the interval of a gain is above zero, -1 if it is below, 0 if it includes zero or is unknown."""
    if found is None or found["low"] is None:
        return 0
    return int(found["low"] > 0) - int(found["high"] < 0)


def cost_and_gain(study: dict[str, Any]) -> str:
    """The paragraph on the search's cost, what its claims leave open, and one mask of the samples that rank first."""
    reference = reference_of(study)
    fish, best = (method_named(study, name) for name in ("fish", "fish_best"))
    if reference["test"]["mean"] is None:
        return f"{reference['label']} failed for every seed, so there is no comparison."
    sentences = [_cost(reference, fish)]
    if any(method is not None and method is not reference for method in (fish, best)):
        sentences.append(_FISH_MASKS if _dropped_none(study, reference) else _where_from(study, reference))
    return " ".join(filter(None, sentences)) + _without_search(study)


_FISH_MASKS = (
    "The search dropped no sample for any seed: its masks are FISH masks, so that a difference comes from their number "
    "of parameters or from choosing among several, not from ranking samples."
)


def _kept_all(study: dict[str, Any], method: dict[str, Any]) -> list[int]:
    """The seeds for which a search's mask uses all drawn samples: a FISH mask."""
    if _ranking(study, method)[0] not in SEARCHES:
        return []
    return [one["seed"] for one in method["seeds"] if one["pool"] and one["samples"] == one["pool"]]


def _dropped_none(study: dict[str, Any], method: dict[str, Any]) -> bool:
    ended = [one for one in method["seeds"] if one["test"] is not None]
    return bool(ended) and len(_kept_all(study, method)) >= len(ended)


def _cost(reference: dict[str, Any], fish: dict[str, Any] | None) -> str:
    if reference["fine_tunings"] is None:
        return f"The cost of {reference['label']} is unknown."
    one = ""
    if fish is not None and fish is not reference and fish["fine_tunings"] is not None:
        retrained = (fish["evaluations"] or 0) > len(fish["grid"])
        one = f", one FISH mask {number(fish['fine_tunings'], 3)}"
        one += " (retrained with other seeds for the same budget, the best kept)" if retrained else ""
    return (
        f"A seed of {reference['label']} cost {number(reference['fine_tunings'], 3)} fine-tunings{one}. "
        "One training of one candidate is 1; Fisher passes count, the learning-rate grid does not."
    )


def _where_from(study: dict[str, Any], reference: dict[str, Any]) -> str:
    """What is unknown of a gain over one FISH mask, because as many draws were not compared, or are as good."""
    claims = claims_of(study)
    one, many = (claim_on(claims, reference["name"], name) for name in ("fish", "fish_best"))
    if one is None or one["verdict"] != HOLDS:
        return ""
    if many is None or many["verdict"] == TOO_FEW:
        return (
            "Without the baseline of equal budget it is unknown whether the gain over one FISH mask comes from ranking "
            "samples or from choosing among several masks."
        )
    if many["verdict"] == HOLDS:
        return ""
    return (
        "Nothing shows that the gain over one FISH mask comes from ranking samples: choosing among several masks may "
        "be all of it."
    )


def _hint(seeds: int) -> str:
    return f" With {seeds} seeds that is a hint, not a proof." if seeds < ENOUGH_SEEDS else ""


def _without_search(study: dict[str, Any]) -> str:
    """Whether one mask of the fewest samples, the first of the search's ranking, does as well as the search."""
    reference = reference_of(study)
    kind, changes = _ranking(study, reference)
    top = next((one for one in study["methods"] if _ranking(study, one) == ("top_samples", changes)), None)
    found = gain(study, top)
    if kind != "ird" or top is None or found is None or found["n"] < FEWEST_SEEDS:
        return ""
    count = next((f"{one['samples']:,} " for one in top["seeds"] if one["samples"]), "")
    mask, where, seeds = f"ne mask of the {count}samples that rank first ({top['label']})", side(found), found["n"]
    preferred = (reference, top) if where > 0 else (top, reference)
    costs = [number(one["fine_tunings"], 3) for one in preferred if one["fine_tunings"] is not None]
    cost = f", for {costs[0]} fine-tunings instead of {costs[1]}" if len(costs) == 2 else ""
    if where > 0:
        text = f" The search gained {signed_interval(found)}, over o{mask}{cost}."
    else:
        as_well = f"does as well as the search, as far as {seeds} seeds can show"
        does = "does better than the search" if where < 0 else as_well
        text = f" O{mask} {does} (gain of the search {signed_interval(found)}){cost}{_what_pays(study, top, where)}."
    return text + _hint(seeds)


def _ranking(study: dict[str, Any], method: dict[str, Any]) -> tuple[str, list[str]]:
    """A method's kind, and its changes that affect the ranking of samples or their masks."""
    variants = study["config"]["compare"]["variants"]
    kind, *changes = spelled_out(method["name"], variants)
    return kind, sorted(change for change in changes if not change.startswith(_WAY))


def _what_pays(study: dict[str, Any], top: dict[str, Any], where: int) -> str:
    """What the mask of the first samples gains over a mask of random or of all samples, if it does."""
    for name, words, what in (
        ("fish_small", "as many random samples", "the ranking"),
        ("fish", "all samples", "the choice of samples"),
    ):
        control = method_named(study, name)
        if control is not None:
            lower, within = study["task"]["lower_is_better"], METRIC_RANGES.get(study["task"]["metric"], ANY)
            over = as_gain(paired_methods(top, control, lower, within), lower)
            if side(over) <= 0:
                return ""
            pays = "is what pays, not the search" if where < 0 else "pays, and nothing shows that the search adds to it"
            return f"; over one mask of {words} it gained {signed_interval(over)}: {what} {pays}"
    return ""


def notes(study: dict[str, Any]) -> list[str]:
    """Notes on the table: how it was made, warnings, and where the grid may be too narrow."""
    reference, seeds = reference_of(study), len(study["seeds"])
    others = len(study["methods"]) - 1
    lines = [
        rates_in_words(study),
        f"Differences are {reference['label']} minus the method, seed by seed on the test split; "
        f"{'lower' if study['task']['lower_is_better'] else 'higher'} is better. "
        "Wins are seeds where the reference is better. p is of the two-sided paired t-test.",
        "Trainings are those of one seed, including the learning-rate grid. Cost is in trainings of one seed: those "
        "after the learning rate is chosen, and the Fisher passes.",
        f"The 95 % t intervals and p of the methods are not corrected for the number of comparisons ({others}): "
        "about 1 in 20 true-zero differences looks significant.",
    ]
    if study.get("costs"):
        lines.append(
            "Trained parameters are those beside a new head; the adapter's file holds the head too. Seconds are of "
            "one training with its evaluation, and the peak is that of its GPU memory."
        )
    for method in study["methods"]:
        kept = len(_kept_all(study, method))
        if kept:
            lines.append(
                f"{method['label']} dropped no sample for {kept} of {seeds} seed{'s' if seeds > 1 else ''}: "
                "its mask there is a FISH mask."
            )
    if seeds < ENOUGH_SEEDS:
        count = "One seed gives" if seeds == 1 else f"{seeds} seeds give"
        count += " no intervals" if seeds < FEWEST_SEEDS else " wide intervals"
        lines.append(f"{count}: these results are a hint, not a proof; use {ENOUGH_SEEDS} or more.")
    errors = [method["test_error"] for method in study["methods"] if method["test_error"] is not None]
    if errors:
        low, high = f"{min(errors):.4f}", f"{max(errors):.4f}"
        lines.append(
            f"The {study['task']['test']:,} samples of the test split give each test metric a standard error of "
            f"{low if low == high else f'{low} to {high}'}, which intervals over seeds do not include."
        )
    base = study["base"]
    if base and base["test"] is not None:
        lines.append(f"The base model: {study['task']['metric']} {base['test']:.4f} on the test split.")
    warned = [f"Warning on the tested trainings: {text}" for text in study["warnings"]]
    return warned + study.get("budget_warnings", []) + lines + _out_of_reach(study) + edge_notes(study)


def _out_of_reach(study: dict[str, Any]) -> list[str]:
    """A note on methods with fewer samples than any search can reach; empty if there are none."""
    fewest = study["fewest"] or 0
    beyond = {
        method["label"]: one["samples"]
        for method in study["methods"]
        if _ranking(study, method)[0] in FEW
        for one in method["seeds"]
        if one["samples"] is not None and one["samples"] < fewest
    }
    if not beyond:
        return []
    return [
        f"In so few rounds a search reaches {fewest:,} samples at the least, not the {min(beyond.values()):,} of "
        f"{', '.join(beyond)}; increase search.max_rounds to allow it."
    ]


def failures(study: dict[str, Any]) -> list[str]:
    """One line for each seed of each method that failed."""
    return [
        f"{method['label']}, seed {one['seed']}: {one['error'] or 'no test metric'}"
        for method in study["methods"]
        for one in method["seeds"]
        if one["error"] is not None or one["test"] is None
    ]


def signed_interval(found: dict[str, Any]) -> str:
    """A difference with its interval as text: +0.0100, 95 % interval +0.0020 to +0.0180."""
    limits = "" if found["low"] is None else f", 95 % interval {found['low']:+.4f} to {found['high']:+.4f}"
    return f"{found['mean']:+.4f}{limits}"
