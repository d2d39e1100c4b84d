"""What a search tells of its data and its parameters: what the ranking of samples follows, and how masks follow it."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2, kruskal, mannwhitneyu, spearmanr

from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.masks.mask import Mask
from irdscale.report.verdict import percent
from irdscale.search.ird import Pair
from irdscale.utils.files import read_json

LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
OTHER = "other"
# Sizes of a correlation from which a ranking is called largely, or partly, another thing in disguise.
LARGELY, PARTLY = 0.5, 0.3
# Classes whose mean traces are listed.
CLASSES = 20
TOP = 5


@dataclass(frozen=True)
class Relation:
    """How the ranking of the samples relates to one of their properties.

    Attributes:
        name: the property.
        measure: what `value` is: "Spearman", "eta squared" (the share of the ranks' variance that a class explains), or
            "AUC" (the probability that one of the named samples has the larger trace of a pair).
        chance: between which 95 % of the values lie where there is no relation.
        strength: size on the scale of a correlation; 0 where chance alone may do as much.
        held: the partial correlation with length or loss, the other one held.
    """

    name: str
    measure: str
    value: float
    chance: tuple[float, float]
    strength: float
    held: float | None = None


@dataclass(frozen=True)
class Overlap:
    """The masks of the search's sample sets at its largest p.

    Attributes:
        params: p.
        names: of the masks, that of the most samples first.
        shares: entries that two masks have in common, as a share of p, by row and column.
        chance: what two random masks have in common.
    """

    params: int
    names: list[str]
    shares: list[list[float]]
    chance: float


@dataclass(frozen=True)
class Layer:
    """One numbered layer, or all that is outside them.

    Attributes:
        shares: of the entries of each sample set's mask, the share that lies here; the largest set first.
        kept: of the smallest set's entries here, the share that the largest set's mask has too; None if there are none.
        chance: the same for entries drawn at random.
    """

    name: str
    shares: list[float]
    kept: float | None
    chance: float

    @property
    def gain(self) -> float:
        """By how much the share grows from the largest to the smallest sample set."""
        return self.shares[-1] - self.shares[0]


@dataclass(frozen=True)
class Drivers:
    """Which samples the winner's mask comes from.

    Attributes:
        half: so many of `samples`, the largest first, hold half of the Fisher information inside the mask.
        top: the samples with the largest shares.
        correlations: property -> Spearman correlation of the share with it.
    """

    samples: int
    half: int
    top: list[dict[str, Any]]
    correlations: dict[str, float]


@dataclass(frozen=True)
class Analysis:
    """What the section "Samples and parameters" of a report shows.

    Attributes:
        sentences: in words.
        ranked: what the relations are of: the "ranking", or the "trace" where samples are shuffled.
        classes: class, samples, mean trace.
        altered: samples in a set, and the share of altered ones among them.
        top: the samples with the largest traces: row, trace, share of the pool's sum, length, loss, label.
        sizes: the sample sets, the largest first.
    """

    sentences: list[str]
    ranked: str
    relations: list[Relation]
    classes: list[tuple[Any, int, float]]
    altered: list[tuple[int, float]]
    top: list[dict[str, Any]]
    sizes: list[int]
    overlap: Overlap | None
    layers: list[Layer]
    drivers: Drivers | None


def analyse(output: Path, result: dict[str, Any], traces: dict[str, Any], masks: dict[Pair, str]) -> Analysis:
    """Read the masks of a finished search and what is known of its samples.

    Args:
        traces: traces.json.
        masks: pair -> hash.

    Raises:
        InputError: a mask is missing or damaged.
    """
    kind, trace = result["task"]["kind"], traces["trace"]
    ranked, found = ranking_relations(traces, result["direction"], kind)
    sentences = [headline(found, ranked)] if found else []
    flags = traces.get("altered")
    p = max(pair.params for pair in masks)
    sizes = sorted((pair.samples for pair in masks if pair.params == p), reverse=True)
    altered = []
    if flags is not None and 0 < sum(flags) < len(flags):
        altered = [(s, sum(flags[i] for i in traces["order"][:s]) / s) for s in sizes]
        sentences.append(_about_altered(found, altered, sum(flags) / len(flags)))
    loaded: dict[str, Mask] = {}

    def load(mask: str) -> Mask:
        if mask not in loaded:
            loaded[mask] = Mask.load(output / "masks" / mask)
        return loaded[mask]

    overlap, layers = None, []
    if len({masks[Pair(s, p)] for s in sizes}) > 1:
        of_sets = {f"{s:,}": load(masks[Pair(s, p)]) for s in sizes}
        layers = by_layer(list(of_sets.values()))
        fish = result["baseline"]["fish_random"]
        with_fish = {"FISH": load(Path(fish["mask"]).name)} if fish["params"] == p else {}
        overlap = overlaps({**of_sets, **with_fish}, p)
        sentences += [_about_overlaps(overlap, sizes), *_about_layers(layers, sizes)]
    elif len(sizes) > 1:
        sentences.append("The masks of all sample sets are the same.")
    held = concentration(load(Path(result["best"]["mask"]).name))
    sentences += [] if held is None else [held]
    sentences += _about_fish(result, load)
    stored = output / "fisher" / "drivers.json"
    measured = read_json(stored, "list of what drives a mask") if stored.exists() else {}
    # A file of an earlier search in the same folder tells nothing of this one.
    same = measured.get("mask") == Path(result["best"]["mask"]).name
    return Analysis(
        sentences,
        ranked,
        found,
        _classes(traces, kind),
        altered,
        _top(trace, sum(trace), range(len(trace)), traces),
        sizes,
        overlap,
        layers,
        drivers(measured, traces) if same else None,
    )


def ranking_relations(traces: Mapping[str, Any], direction: str, kind: str) -> tuple[str, list[Relation]]:
    """What a search's ranking of its samples follows, the trace among it where that is not what ranks them.

    Args:
        traces: traces.json.

    Returns:
        What the relations are of, "ranking" or, where samples are shuffled, "trace"; and the relations.
    """
    trace, order = traces["trace"], traces["order"]
    if direction == "random":
        return "trace", relations(np.asarray(trace, dtype=float), traces, kind)
    if _follows(order, trace, direction):
        return "ranking", relations(np.asarray(trace, dtype=float), traces, kind)
    values = _places(order, direction)
    return "ranking", [*_with_numbers("the trace", values, trace), *relations(values, traces, kind)]


def _follows(order: Sequence[int], trace: Sequence[float], direction: str) -> bool:
    sign = 1 if direction == "reverse" else -1
    return list(order) == sorted(range(len(trace)), key=lambda i: sign * trace[i])


def _places(order: Sequence[int], direction: str) -> np.ndarray:
    """A number for each sample by its place in the order, larger for those that `direction: ird` keeps."""
    values = np.empty(len(order))
    values[list(order)] = np.arange(len(order)) * (1.0 if direction == "reverse" else -1.0)
    return values


def relations(values: Any, traces: Mapping[str, Any], kind: str) -> list[Relation]:
    """How the samples' values [N] relate to their length, loss, label and, where it is known, to being altered.

    Properties that are the same for all samples are left out.
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
    """Spearman's rank correlation; None where one of both is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    # Rounded, so that equal orders give exactly 1.
    return round(float(spearmanr(a, b).statistic), 12)


def partial_spearman(a: Any, b: Any, held: Any) -> float | None:
    """Rank correlation of a and b, what both share with `held` taken out; None where nothing is left."""
    ab, ac, bc = spearman(a, b), spearman(a, held), spearman(b, held)
    if ab is None or ac is None or bc is None or max(abs(ac), abs(bc)) == 1.0:
        return None
    return (ab - ac * bc) / math.sqrt((1 - ac**2) * (1 - bc**2))


def eta_squared(values: Any, classes: Sequence[Any]) -> float | None:
    """Share of the variance of the values' ranks that the classes explain; None where there is none to explain.

    Raises:
        ValueError: there is but one class.
    """
    if np.ptp(values) == 0:
        return None
    inside = [np.asarray(values)[[c == one for c in classes]] for one in set(classes)]
    return float(kruskal(*inside).statistic) / (len(classes) - 1)


def larger_probability(values: Any, flags: Sequence[bool]) -> float | None:
    """The probability that a flagged sample's value is larger than another's, ties counted half; the AUC."""
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
    # Kruskal and Wallis: (N - 1) eta squared follows chi squared of C - 1 degrees of freedom.
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
    """Whether the ranking is something else in disguise, in words that claim no more than the numbers show."""
    known = sorted((r for r in found if r.measure != "AUC" and r.name != "the trace"), key=lambda r: -r.strength)
    follows = [r for r in known if r.strength >= PARTLY]
    if not known:
        return f"Nothing is known of the samples that the {ranked} could follow."
    if not follows:
        faint = [r for r in known if _beyond_chance(r)]
        rest = [r for r in known if r not in faint]
        said = []
        if faint:
            said.append(
                f"The {ranked} follows {_listed(faint, 'and')} a little, more than by chance: {_figures(faint)}."
            )
        if rest:
            said.append(f"There is no sign that the {ranked} is {_listed(rest, 'or')} in disguise: {_figures(rest)}.")
        return " ".join(said)
    how = "largely" if follows[0].strength >= LARGELY else "partly"
    more = f" It also follows {'; '.join(f'{r.name}: {_figure(r)}' for r in follows[1:])}." if follows[1:] else ""
    return f"The {ranked} is {how} {follows[0].name} in disguise: {_figure(follows[0])}.{more}"


def _beyond_chance(relation: Relation) -> bool:
    """Whether the relation, or what is left of it with another property held, is outside what chance does."""
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
    """Where 95 % of the values of an unrelated property lie, in words."""
    low, high = relation.chance
    if relation.measure == "Spearman":
        return f"±{high:.2f}"
    return f"below {high:.2f}" if relation.measure == "eta squared" else f"{low:.2f} to {high:.2f}"


def _about_altered(found: list[Relation], altered: list[tuple[int, float]], base: float) -> str:
    auc = next(r.value for r in found if r.measure == "AUC")
    size, share = altered[-1]
    return (
        f"An altered sample ranks above another with probability {auc:.2f} (0.5 is no relation); altered samples are "
        f"{percent(base)} of the pool and {percent(share)} of the smallest set, of {size:,} samples."
    )


def common_entries(a: Mask, b: Mask) -> dict[str, int]:
    """name -> how many entries both masks have, where there are any in both."""
    shared = (name for name in a.indices if name in b.indices)
    return {n: int(torch.isin(a.indices[n], b.indices[n], assume_unique=True).sum()) for n in shared}


def layer_of(name: str) -> str:
    """The number of a parameter's layer, or `OTHER`."""
    found = LAYER.match(name)
    return found[2] if found else OTHER


def _scored(mask: Mask) -> int:
    return sum(torch.Size(shape).numel() for shape in mask.shapes.values())


def most_held(masks: Sequence[Mask]) -> tuple[str, float, float] | None:
    """The parameter with the most entries of these masks of one model, and its shares of them and of what was scored.

    None where the masks are empty.
    """
    held: Counter[str] = Counter()
    for mask in masks:
        held.update({name: len(index) for name, index in mask.indices.items()})
    if not held.total():
        return None
    name, count = held.most_common(1)[0]
    return name, count / held.total(), torch.Size(masks[0].shapes[name]).numel() / _scored(masks[0])


def concentration(mask: Mask) -> str | None:
    """In words: the one parameter that holds most of a mask's entries, beyond its size; None if none does."""
    held = most_held([mask])
    if held is None or held[1] <= max(0.5, 2 * held[2]):
        return None
    name, share, size = held
    return (
        f"{percent(share)} of the mask's entries are in {name}, which has {percent(size)} of the scored parameters: "
        f"fisher.exclude leaves it out, fisher.scope=layerwise gives every parameter entries by its size."
    )


def overlaps(masks: Mapping[str, Mask], p: int) -> Overlap:
    """What every two of the named masks of p entries have in common."""
    names, listed = list(masks), list(masks.values())
    shares = [[1.0] * len(listed) for _ in listed]
    for i, j in itertools.combinations(range(len(listed)), 2):
        shares[i][j] = shares[j][i] = sum(common_entries(listed[i], listed[j]).values()) / p
    return Overlap(p, names, shares, p / _scored(listed[0]))


def by_layer(masks: Sequence[Mask]) -> list[Layer]:
    """Where the entries of several masks of one model lie, the layers by number and the others last."""
    held = [_sums({name: len(index) for name, index in mask.indices.items()}) for mask in masks]
    largest, smallest = masks[0], masks[-1]
    sizes = _sums({name: torch.Size(shape).numel() for name, shape in largest.shapes.items()})
    common = _sums(common_entries(smallest, largest))
    names = sorted(sizes, key=lambda name: (name == OTHER, int(name) if name != OTHER else 0))
    return [
        Layer(
            name,
            [one.get(name, 0) / mask.k for one, mask in zip(held, masks, strict=True)],
            common.get(name, 0) / held[-1][name] if held[-1].get(name) else None,
            held[0].get(name, 0) / sizes[name],
        )
        for name in names
    ]


def _sums(counts: Mapping[str, int]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for name, count in counts.items():
        layer = layer_of(name)
        totals[layer] = totals.get(layer, 0) + count
    return totals


def _about_overlaps(overlap: Overlap, sizes: list[int]) -> str:
    ends = range(len(sizes) - 1)
    neighbours = [overlap.shares[i][i + 1] for i in ends]
    low, high = percent(min(neighbours)), percent(max(neighbours))
    span = low if low == high else f"{low} to {high}"
    text = f"Of their {overlap.params:,} entries, the masks of neighbouring sample sets share {span}"
    if len(sizes) > 2:
        text += f", those of {sizes[0]:,} and {sizes[-1]:,} samples {percent(overlap.shares[0][len(sizes) - 1])}"
    return f"{text}; random masks would share {percent(overlap.chance)}. The smaller sets are parts of the larger ones."


def _about_layers(layers: list[Layer], sizes: list[int]) -> list[str]:
    most, least = max(layers, key=lambda row: row.gain), min(layers, key=lambda row: row.gain)
    if len(layers) < 2 or most.gain <= 0:
        return []
    return [
        f"From {sizes[0]:,} to {sizes[-1]:,} samples, {_named(most)} gains most of the mask "
        f"({100 * most.gain:+.1f} percentage points) and {_named(least)} loses most ({100 * least.gain:+.1f})."
    ]


def _named(layer: Layer) -> str:
    return "what is outside the layers" if layer.name == OTHER else f"layer {layer.name}"


def _about_fish(result: dict[str, Any], load: Any) -> list[str]:
    fish = result["baseline"]["fish_random"]
    if fish["same_mask_as_best"]:
        return []
    best, other = (load(Path(entry["mask"]).name) for entry in (result["best"], fish))
    shared = sum(common_entries(best, other).values()) / best.k
    return [
        f"The winner's mask has {percent(shared)} of its {best.k:,} entries in common with that of as many random "
        f"samples (FISH); random masks would share {percent(best.k / _scored(best))}."
    ]


def _classes(traces: dict[str, Any], kind: str) -> list[tuple[Any, int, float]]:
    found = sorted(set(traces["label"])) if kind == "sequence-classification" else []
    if not 1 < len(found) <= CLASSES:
        return []
    pairs = list(zip(traces["label"], traces["trace"], strict=True))
    inside = [(one, [trace for label, trace in pairs if label == one]) for one in found]
    return [(one, len(values), sum(values) / len(values)) for one, values in inside]


def _top(values: Sequence[float], total: float, places: Sequence[int], traces: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples with the largest values, the largest first, and their shares of the total."""
    chosen = sorted(range(len(values)), key=lambda i: -values[i])[:TOP]
    return [
        {
            "row": traces["row"][place],
            "share": value / total if total else 0.0,
            **{key: traces[key][place] for key in ("trace", "length", "loss", "label")},
        }
        for place, value in ((places[i], values[i]) for i in chosen)
    ]


def drivers(measured: dict[str, Any], traces: dict[str, Any]) -> Drivers:
    """What drivers.json tells, beside what is known of the samples."""
    places, shares = measured["place"], measured["share"]
    ordered = np.cumsum(sorted(shares, reverse=True))
    half = int(np.searchsorted(ordered, 0.5 * ordered[-1])) + 1
    correlations: dict[str, float] = {}
    for name in ("length", "loss"):
        rho = spearman(shares, [traces[name][place] for place in places])
        if rho is not None:
            correlations[name] = rho
    return Drivers(len(shares), half, _top(shares, sum(shares), places, traces), correlations)
