"""The claims that a comparison tests, with evidence and verdict, computed from the test metrics by seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import isfinite
from typing import Any

from irdscale.compare.method_specs import FAR
from irdscale.config.compare import spelled_out
from irdscale.config.kinds import METRIC_RANGES
from irdscale.report.statistics import ANY, FEWEST_SEEDS, as_gain, holm, paired
from irdscale.utils.formats import count, counted, number

HOLDS, CONTRADICTED, NOT_TOLD_APART, TOO_FEW = "holds", "contradicted", "not told apart", "too few seeds"
# Largest adjusted p of a claim that holds or is contradicted.
LEVEL = 0.05


@dataclass(frozen=True)
class _Question:
    """A claim before it is known which methods a comparison has.

    Attributes:
        better, than: kinds of methods; the claim is that one of `better` is better than one of `than`.
        equal_sizes: whether it is a claim on equal numbers of trained parameters.
    """

    better: tuple[str, ...]
    than: str
    equal_sizes: bool = False


# A Fisher mask is one of FISH, of the best of draws, or of IRD.
_FISHER = ("fish", "fish_best", "ird")
_QUESTIONS = (
    _Question(("ird",), "fish"),
    _Question(("ird",), "reverse"),
    _Question(("ird",), "fish_best"),
    _Question(_FISHER, "random_mask"),
    _Question(_FISHER, "magnitude_mask"),
    _Question(_FISHER, "lora", equal_sizes=True),
)
# Changes that make another method than the kind says: another score, another direction, random entries.
_OTHER_METHOD = ("fisher.score=", "search.direction=", "compare.lora.form=shira")
# Changes that affect the masks of all kinds.
_OF_MASKS = ("fisher.", "search.ratio=")

COLUMNS = ["claim", "mean gain", "95 % interval", "wins", "p", "p (Holm)", "trainings of each", "verdict"]


def claims_of(study: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims on methods that are both in a comparison, in a fixed order.

    Returns:
        {"claim", "better", "than", "mean", "low", "high", "n", "wins", "losses", "ties", "p", "p_holm", "trainings",
        "params", "verdict"} of each: `better` and `than` are names of methods. `mean`, `low` and `high` are those of
        the paired gain, positive if `better` is better. `p_holm` is `p` adjusted for all claims that have one.
        `trainings` and `params` are pairs. `verdict` is None where a claim on equal parameters has unequal ones.
    """
    found = [_claim(study, question, *pair) for question in _QUESTIONS if (pair := _pair(study, question))]
    tested = [claim for claim in found if claim["p"] is not None]
    for claim, adjusted in zip(tested, holm([claim["p"] for claim in tested]), strict=True):
        claim["p_holm"] = adjusted
        if adjusted <= LEVEL:
            claim["verdict"] = HOLDS if claim["mean"] > 0 else CONTRADICTED
    return found


def claim_on(claims: list[dict[str, Any]], better: str, than: str) -> dict[str, Any] | None:
    """The claim that one named method is better than another; None if there is none."""
    return next((claim for claim in claims if (claim["better"], claim["than"]) == (better, than)), None)


def _pair(study: dict[str, Any], question: _Question) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The two methods of a claim; None if one is missing.

    Equal sizes come first where the claim asks for them, then equal masks, methods without changes, the nearest number
    of trainings, and the order of the kinds and of the methods.
    """
    changes = {method["name"]: _changes(study, method) for method in study["methods"]}

    def of_kind(kind: str) -> list[dict[str, Any]]:
        return [
            method
            for method in study["methods"]
            if changes[method["name"]][0] == kind
            and not any(change.startswith(_OTHER_METHOD) for change in changes[method["name"]][1])
        ]

    def preference(pair: tuple[dict[str, Any], dict[str, Any]]) -> tuple[float, ...]:
        kinds = [changes[method["name"]] for method in pair]
        masks = [sorted(change for change in changed if change.startswith(_OF_MASKS)) for _, changed in kinds]
        trainings = [method["evaluations"] or 0 for method in pair]
        return (
            question.equal_sizes and _far_apart(*pair),
            masks[0] != masks[1],
            sum(method["name"] != kind for method, (kind, _) in zip(pair, kinds, strict=True)),
            abs(trainings[0] - trainings[1]),
        )

    firsts = [method for kind in question.better for method in of_kind(kind)]
    return min(product(firsts, of_kind(question.than)), key=preference, default=None)


def _changes(study: dict[str, Any], method: dict[str, Any]) -> tuple[str, list[str]]:
    """A method's kind and its changes."""
    kind, *changes = spelled_out(method["name"], study["config"]["compare"]["variants"])
    return kind, changes


def _far_apart(mask: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two methods differ in trained parameters by more than 5 % of the first; unknown ones do not."""
    if mask["params"] is None or other["params"] is None:
        return False
    return bool(abs(other["params"] - mask["params"]) > FAR * mask["params"])


def _claim(study: dict[str, Any], question: _Question, better: dict[str, Any], than: dict[str, Any]) -> dict[str, Any]:
    """A claim with its evidence, before p is adjusted."""
    lower, within = study["task"]["lower_is_better"], METRIC_RANGES.get(study["task"]["metric"], ANY)
    found = paired(_tests(better), _tests(than), lower, within)
    judged = not (question.equal_sizes and _far_apart(better, than))
    enough = found["n"] >= FEWEST_SEEDS
    return {
        "claim": f"{better['label']} over {than['label']}" + (", equal parameters" if question.equal_sizes else ""),
        "better": better["name"],
        "than": than["name"],
        **as_gain(found, lower),
        **{key: found[key] for key in ("wins", "losses", "ties")},
        "p": _probability(found) if judged and enough else None,
        "p_holm": None,
        "trainings": [better["evaluations"], than["evaluations"]],
        "params": [better["params"], than["params"]],
        "verdict": (NOT_TOLD_APART if enough else TOO_FEW) if judged else None,
    }


def _tests(method: dict[str, Any]) -> dict[int, float | None]:
    """Seed -> test metric; None for a failed seed, also for one that is not finite."""
    return {
        one["seed"]: one["test"] if one["test"] is not None and isfinite(one["test"]) else None
        for one in method["seeds"]
    }


def _probability(found: Mapping[str, Any]) -> float:
    """p of the paired t-test; of the sign test where all differences are equal, for which t is undefined."""
    if found["p"] is not None:
        return float(found["p"])
    return min(1.0, 2 * 0.5 ** max(found["wins"], found["losses"]))


def claim_rows(claims: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of each claim, by `COLUMNS`."""
    return [
        [
            claim["claim"],
            "-" if claim["mean"] is None else f"{claim['mean']:+.4f}",
            "-" if claim["low"] is None else f"{claim['low']:+.4f} to {claim['high']:+.4f}",
            f"{claim['wins']} of {claim['n']}",
            p_in_words(claim["p"]),
            p_in_words(claim["p_holm"]),
            ", ".join("-" if each is None else number(each, 3) for each in claim["trainings"]),
            _in_words(claim),
        ]
        for claim in claims
    ]


def _in_words(claim: dict[str, Any]) -> str:
    if claim["verdict"] is not None:
        return str(claim["verdict"])
    mask, other = (count(size) for size in claim["params"])
    return f"none: sizes differ ({mask} and {other} parameters)"


def p_in_words(p: float | None) -> str:
    """A probability for a table."""
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def how_to_read(study: dict[str, Any], claims: list[dict[str, Any]]) -> str:
    """What the columns of the claims are, and what each verdict means."""
    metric, tested = study["task"]["metric"], [claim for claim in claims if claim["p"] is not None]
    better = "lower" if study["task"]["lower_is_better"] else "higher"
    sentences = [
        f"The gain is the paired difference in test {metric}, positive if the first method is better "
        f"({better} {metric}). Wins are seeds where it is better."
    ]
    if tested:
        sentences.append(
            "p is of the two-sided paired t-test. "
            f"p (Holm) is p adjusted for {counted(len(tested), 'tested claim')}; the intervals are not adjusted. "
            f"A claim with a p (Holm) of at most {LEVEL:g} holds or is contradicted; otherwise its two methods are "
            "not told apart."
        )
    if any(claim["verdict"] == TOO_FEW for claim in claims):
        sentences.append(f"A test needs {FEWEST_SEEDS} seeds that both methods finished.")
    if any(claim["low"] == claim["high"] for claim in tested):
        sentences.append("Where all differences are equal, p is of the sign test.")
    if any(claim["trainings"][0] != claim["trainings"][1] for claim in claims):
        sentences.append("The method with more trainings has an advantage: its best one on the selection split counts.")
    return " ".join(sentences)
