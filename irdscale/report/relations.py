"""Relations between the ranking of the samples and their properties, such as their lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import chi2, kruskal, mannwhitneyu, spearmanr

from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.utils.formats import percent

# Correlations from which the ranking largely, or partly, follows a property.
LARGELY, PARTLY = 0.5, 0.3


@dataclass(frozen=True)
class Relation:
    """The relation of the ranking of the samples to one of their properties.

    Attributes:
        name: property.
        measure: "Spearman", "eta squared" (share of the variance of the ranks that a class explains), or "AUC"
            (probability that a flagged sample has a larger trace than another).
        value: value of `measure`.
        chance: range of 95 % of the values of an unrelated property.
        strength: size on the scale of a correlation; 0 where chance alone may give as much.
        held: partial correlation with length (or loss) for constant loss (or length).
    """

    name: str
    measure: str
    value: float
    chance: tuple[float, float]
    strength: float
    held: float | None = None


def ranking_relations(traces: Mapping[str, Any], direction: str, kind: str) -> tuple[str, list[Relation]]:
    """The relations of a search's ranking of its samples, also to the trace unless the trace ranks them.

    Args:
        traces: contents of traces.json.

    Returns:
        The subject of the relations, "ranking" or, for shuffled samples, "trace"; and the relations.
    """
    trace, order = traces["trace"], traces["order"]
    if direction == "random":
        return "trace", relations(np.asarray(trace, dtype=float), traces, kind)
    if _follows(order, trace, direction):
        return "ranking", relations(np.asarray(trace, dtype=float), traces, kind)
    values = _scores(order, direction)
    return "ranking", [*_with_numbers("the trace", values, trace), *relations(values, traces, kind)]


def _follows(order: Sequence[int], trace: Sequence[float], direction: str) -> bool:
    sign = 1 if direction == "reverse" else -1
    return list(order) == sorted(range(len(trace)), key=lambda i: sign * trace[i])


def _scores(order: Sequence[int], direction: str) -> np.ndarray:
    """A number for each sample from its rank in `order`, larger for those that `direction: ird` keeps."""
    values = np.empty(len(order))
    values[list(order)] = np.arange(len(order)) * (1.0 if direction == "reverse" else -1.0)
    return values


def relations(values: Any, traces: Mapping[str, Any], kind: str) -> list[Relation]:
    """The relations of the samples' values [N] to their length, loss, label and, where known, to being altered.

    Properties that are equal for all samples are left out.
    """
    length, loss = traces["length"], traces["loss"]
    found = []
    for name, own, other in (("length", length, loss), ("loss", loss, length)):
        found += _with_numbers(name, values, own, other)
    label = traces["label"]
    if kind == "sequence-classification":
        found += _with_classes("class", values, label)
    elif kind == "regression":
        mean = sum(label) / len(label)
        found += _with_numbers("label", values, label)
        found += _with_numbers("distance of the label from the mean", values, [abs(y - mean) for y in label])
    elif kind in LANGUAGE_KINDS and spearman(label, length) != 1.0:
        found += _with_numbers("target tokens", values, label)
    if traces.get("altered") is not None:
        found += _with_flags("altered", values, traces["altered"])
    return found


def spearman(a: Any, b: Any) -> float | None:
    """Spearman's rank correlation; None if either is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    # Rounded, so that equal orders give exactly 1.
    return round(float(spearmanr(a, b).statistic), 12)


def partial_spearman(a: Any, b: Any, held: Any) -> float | None:
    """Partial rank correlation of a and b for constant `held`; None if `held` determines either."""
    ab, ac, bc = spearman(a, b), spearman(a, held), spearman(b, held)
    if ab is None or ac is None or bc is None or max(abs(ac), abs(bc)) == 1.0:
        return None
    return (ab - ac * bc) / math.sqrt((1 - ac**2) * (1 - bc**2))


def eta_squared(values: Any, classes: Sequence[Any]) -> float | None:
    """Share of the variance of the values' ranks that the classes explain; None if the values are constant.

    Raises:
        ValueError: there is only one class.
    """
    if np.ptp(values) == 0:
        return None
    inside = [np.asarray(values)[[c == one for c in classes]] for one in set(classes)]
    return float(kruskal(*inside).statistic) / (len(classes) - 1)


def larger_probability(values: Any, flags: Sequence[bool]) -> float | None:
    """Probability that a flagged sample's value is larger than another's, with ties counted half; the AUC."""
    flagged = np.asarray(flags, dtype=bool)
    inside, outside = np.asarray(values)[flagged], np.asarray(values)[~flagged]
    pairs = len(inside) * len(outside)
    return float(mannwhitneyu(inside, outside).statistic) / pairs if pairs else None


def _with_numbers(name: str, values: Any, numbers: Any, held: Any = None) -> list[Relation]:
    rho = spearman(values, numbers)
    if rho is None:
        return []
    bound = min(1.0, 1.96 / math.sqrt(len(numbers) - 1))
    partial = None if held is None else partial_spearman(values, numbers, held)
    return [Relation(name, "Spearman", rho, (-bound, bound), abs(rho) if abs(rho) > bound else 0.0, partial)]


def _with_classes(name: str, values: Any, classes: Sequence[Any]) -> list[Relation]:
    count, samples = len(set(classes)), len(classes)
    eta = eta_squared(values, classes) if 1 < count < samples else None
    if eta is None:
        return []
    # Kruskal and Wallis: (N - 1) eta squared follows chi squared with C - 1 degrees of freedom.
    bound = min(1.0, float(chi2.ppf(0.95, count - 1)) / (samples - 1))
    corrected = 1 - (1 - eta) * (samples - 1) / (samples - count)
    return [Relation(name, "eta squared", eta, (0.0, bound), math.sqrt(max(0.0, corrected)) if eta > bound else 0.0)]


def _with_flags(name: str, values: Any, flags: Sequence[bool]) -> list[Relation]:
    auc = larger_probability(values, flags)
    if auc is None:
        return []
    a, b = sum(flags), len(flags) - sum(flags)
    width = min(0.5, 1.96 * math.sqrt((a + b + 1) / (12 * a * b)))
    strength = abs(2 * auc - 1) if abs(auc - 0.5) > width else 0.0
    return [Relation(name, "AUC", auc, (0.5 - width, 0.5 + width), strength)]


def headline(found: list[Relation], ranked: str) -> str:
    """A sentence on whether the ranking follows a property, which claims no more than the numbers show."""
    known = sorted((r for r in found if r.measure != "AUC" and r.name != "the trace"), key=lambda r: -r.strength)
    follows = [r for r in known if r.strength >= PARTLY]
    if not known:
        return f"No property of the samples varies that the {ranked} could follow."
    if not follows:
        faint = [r for r in known if _beyond_chance(r)]
        rest = [r for r in known if r not in faint]
        parts = []
        if faint:
            names = _listed(faint, "and")
            parts.append(f"The {ranked} follows {names} a little, more than by chance: {_figures(faint)}.")
        if rest:
            parts.append(f"There is no sign that the {ranked} is {_listed(rest, 'or')} in disguise: {_figures(rest)}.")
        return " ".join(parts)
    how = "largely" if follows[0].strength >= LARGELY else "partly"
    more = f" It also follows {'; '.join(f'{r.name}: {_figure(r)}' for r in follows[1:])}." if follows[1:] else ""
    return f"The {ranked} is {how} {follows[0].name} in disguise: {_figure(follows[0])}.{more}"


def _beyond_chance(relation: Relation) -> bool:
    """Whether the value, or the partial correlation, is outside the range of chance."""
    low, high = relation.chance
    held = relation.held is not None and not low <= relation.held <= high
    return relation.strength > 0 or not low <= relation.value <= high or held


def _listed(found: list[Relation], last: str) -> str:
    names = [r.name for r in found]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def _figures(found: list[Relation]) -> str:
    return "; ".join(f"{_figure(r)}, by chance {by_chance(r)}" for r in found)


def _figure(relation: Relation) -> str:
    if relation.measure == "eta squared":
        return f"the {relation.name} explains {percent(relation.value)} of the variance of its ranks"
    held = {"length": "loss", "loss": "length"}.get(relation.name)
    partial = "" if relation.held is None else f" ({relation.held:+.2f} with {held} held)"
    return f"Spearman {relation.value:+.2f} with {relation.name}{partial}"


def by_chance(relation: Relation) -> str:
    """The range of 95 % of the values of an unrelated property, as text."""
    low, high = relation.chance
    if relation.measure == "Spearman":
        return f"±{high:.2f}"
    return f"below {high:.2f}" if relation.measure == "eta squared" else f"{low:.2f} to {high:.2f}"
