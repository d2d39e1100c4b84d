"""The analysis of a finished search: what its ranking of samples follows, and how the masks depend on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irdscale.masks.mask import Mask
from irdscale.report.mask_overlap import (
    Layer,
    Overlap,
    by_layer,
    common_entries,
    concentration,
    describe_overlap,
    overlaps,
    scored_parameters,
)
from irdscale.report.relations import Relation, headline, ranking_relations, spearman
from irdscale.search.ird import Pair
from irdscale.search.mask_store import load_mask
from irdscale.utils.files import read_json
from irdscale.utils.formats import percent

# Largest number of classes whose mean traces are listed.
CLASSES = 20
# Most samples listed with the largest values, and with the smallest.
TOP = 10


@dataclass(frozen=True)
class Drivers:
    """The samples that contribute most to the Fisher information inside the winner's mask.

    Attributes:
        samples: number of the samples that the mask is made from.
        half: smallest number of them that hold half of the information.
        top: samples with the largest shares.
        correlations: property -> its Spearman correlation with the share.
    """

    samples: int
    half: int
    top: list[dict[str, Any]]
    correlations: dict[str, float]


@dataclass(frozen=True)
class Analysis:
    """The contents of the section "Samples and parameters" of a report.

    Attributes:
        sentences: findings as text.
        ranked: subject of the relations: "ranking", or "trace" for shuffled samples.
        relations: relations to the properties of the samples.
        classes: class, number of samples, mean trace.
        altered: size of a sample set, and share of altered samples in it.
        top, lowest: samples with the largest and the smallest traces, in this order: place, row, trace, share of the
            pool's sum, length, loss, label. Both are empty if all traces are equal.
        sizes: sizes of the sample sets, largest first.
        overlap: overlap of their masks, if these differ.
        layers: layers of their masks, if these differ.
        drivers: drivers of the winner's mask, if they were measured.
    """

    sentences: list[str]
    ranked: str
    relations: list[Relation]
    classes: list[tuple[Any, int, float]]
    altered: list[tuple[int, float]]
    top: list[dict[str, Any]]
    lowest: list[dict[str, Any]]
    sizes: list[int]
    overlap: Overlap | None
    layers: list[Layer]
    drivers: Drivers | None


def analyse(output: Path, result: dict[str, Any], traces: dict[str, Any], masks: dict[Pair, str]) -> Analysis:
    """Analyse the masks of a finished search and the properties of its samples.

    Args:
        output: folder of the search.
        result: contents of result.json.
        traces: contents of traces.json.
        masks: pair -> hash of its mask.

    Raises:
        InputError: a mask is missing or damaged.
    """
    kind = result["task"]["kind"]
    ranked, found = ranking_relations(traces, result["direction"], kind)
    sentences = [headline(found, ranked)] if found else []
    flags = traces.get("altered")
    p = max(pair.params for pair in masks)
    sizes = sorted((pair.samples for pair in masks if pair.params == p), reverse=True)
    altered = []
    if flags is not None and 0 < sum(flags) < len(flags):
        altered = [(s, sum(flags[i] for i in traces["order"][:s]) / s) for s in sizes]

    @functools.cache
    def load(mask: str) -> Mask:
        return load_mask(output, mask)

    overlap, layers = None, []
    if len({masks[Pair(s, p)] for s in sizes}) > 1:
        of_sets = {f"{s:,}": load(masks[Pair(s, p)]) for s in sizes}
        layers = by_layer(list(of_sets.values()))
        fish = result["baseline"]["fish_random"]
        with_fish = {"FISH": load(Path(fish["mask"]).name)} if fish["params"] == p else {}
        overlap = overlaps({**of_sets, **with_fish}, p)
        sentences.append(describe_overlap(overlap, sizes))
    elif len(sizes) > 1:
        sentences.append("The masks of all sample sets are the same.")
    best = Path(result["best"]["mask"]).name
    held = concentration(load(best))
    sentences += [] if held is None else [held]
    sentences += _describe_fish(result, load)
    stored = output / "fisher" / "drivers.json"
    measured = read_json(stored, "list of drivers of a mask") if stored.exists() else {}
    # The file may be of an earlier search in the same folder.
    same = measured.get("mask") == best
    top, lowest = extremes(traces)
    return Analysis(
        sentences,
        ranked,
        found,
        _classes(traces, kind),
        altered,
        top,
        lowest,
        sizes,
        overlap,
        layers,
        drivers(measured, traces) if same else None,
    )


def _describe_fish(result: dict[str, Any], load: Callable[[str], Mask]) -> list[str]:
    fish = result["baseline"]["fish_random"]
    if fish["same_mask_as_best"]:
        return []
    best, other = (load(Path(entry["mask"]).name) for entry in (result["best"], fish))
    shared = sum(common_entries(best, other).values()) / best.k
    return [
        f"The winner's mask shares {percent(shared)} of its {best.k:,} entries with the mask of as many random samples "
        f"(FISH); random masks would share {percent(best.k / scored_parameters(best))}."
    ]


def _classes(traces: dict[str, Any], kind: str) -> list[tuple[Any, int, float]]:
    found = sorted(set(traces["label"])) if kind == "sequence-classification" else []
    if not 1 < len(found) <= CLASSES:
        return []
    pairs = list(zip(traces["label"], traces["trace"], strict=True))
    inside = [(one, [trace for label, trace in pairs if label == one]) for one in found]
    return [(one, len(values), sum(values) / len(values)) for one, values in inside]


def extremes(traces: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples with the largest and the smallest traces, as in `Analysis`; none if all traces are equal."""
    trace = traces["trace"]
    if min(trace) == max(trace):
        return [], []
    listed = _sorted_samples(trace, range(len(trace)), traces)
    most = min(TOP, len(listed) // 2)
    return listed[:most], listed[len(listed) - most :]


def _sorted_samples(values: Sequence[float], places: Sequence[int], traces: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples, largest value first, with their shares of the sum."""
    total = sum(values)
    chosen = sorted(range(len(values)), key=lambda i: -values[i])
    return [
        {
            "place": place,
            "row": traces["row"][place],
            "share": value / total if total else 0.0,
            **{key: traces[key][place] for key in ("trace", "length", "loss", "label")},
        }
        for place, value in ((places[i], values[i]) for i in chosen)
    ]


def drivers(measured: dict[str, Any], traces: dict[str, Any]) -> Drivers:
    """The contents of drivers.json, with the properties of the samples."""
    places, shares = measured["place"], measured["share"]
    ordered = np.cumsum(sorted(shares, reverse=True))
    half = int(np.searchsorted(ordered, 0.5 * ordered[-1])) + 1
    correlations: dict[str, float] = {}
    for name in ("length", "loss"):
        rho = spearman(shares, [traces[name][place] for place in places])
        if rho is not None:
            correlations[name] = rho
    return Drivers(len(shares), half, _sorted_samples(shares, places, traces)[:TOP], correlations)
