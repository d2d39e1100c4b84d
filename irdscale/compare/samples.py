"""A comparison's samples: what their ranking follows, and how masks depend on them, over the seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from irdscale.compare.method_specs import RANKINGS, Method, asked_methods, owner_of, ranking_name
from irdscale.compare.study import FILE
from irdscale.config.loader import check_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.report.analysis import extremes
from irdscale.report.mask_overlap import overlaps
from irdscale.report.relations import Relation, by_chance, headline, ranking_relations
from irdscale.report.sample_texts import texts_of, with_texts
from irdscale.search.ird import Pair
from irdscale.search.mask_store import index_file, load_mask, mask_folder, read_masks, traces_file
from irdscale.utils.files import read_json
from irdscale.utils.formats import percent

COLUMNS = ["property", "measure", "mean", "over the seeds", "by chance"]


@dataclass(frozen=True)
class Samples:
    """Contents of the report's section "Samples".

    Attributes:
        rows: rows of a table with `COLUMNS`.
        measures: measures of the relations in the table.
        top, lowest: samples of the first seed with the largest and the smallest traces, with their texts.
        missing: sentence on why there are no texts; None if there are.
    """

    sentences: list[str]
    rows: list[list[str]]
    measures: list[str] = field(default_factory=list)
    top: list[dict[str, Any]] = field(default_factory=list)
    lowest: list[dict[str, Any]] = field(default_factory=list)
    missing: str | None = None


@dataclass(frozen=True)
class _Seed:
    """The samples of one seed.

    Attributes:
        altered: shares of altered samples in the pool and in the smallest sample set; None if none was altered.
        start, fewest: samples and entries of the masks.
        pool_mask, first_mask: hashes of the masks of all samples, and of those that rank first.
    """

    relations: dict[str, Relation]
    altered: tuple[float, float] | None
    start: Pair
    fewest: Pair
    pool_mask: str
    first_mask: str


def about_samples(output: Path, study: dict[str, Any]) -> Samples | None:
    """Describe the samples and masks of the reference's ranking, or of the first method with a ranking.

    Returns:
        None if no method ranks samples, or the folder has none of their files.

    Raises:
        InputError: a file is damaged.
    """
    for method, names in _rankings(study):
        files = [file for name in names for file in (traces_file(output, name), index_file(output, name))]
        if any(file.exists() for file in files):
            if not all(file.exists() for file in files):
                return _without(files)
            seeds = [_read(output, name, study["task"]["kind"], method.config.search.direction) for name in names]
            folders = [mask_folder(output, mask) for one in seeds for mask in (one.pool_mask, one.first_mask)]
            if all(folder.exists() for folder in folders):
                described = _described(output, method, seeds)
                return _with_texts(described, method.of_seed(study["seeds"][0]), traces_file(output, names[0]))
            return _without(folders) if any(folder.exists() for folder in folders) else None
    return None


def _rankings(study: dict[str, Any]) -> list[tuple[Method, list[str]]]:
    """The methods that rank samples, the reference first, each with the names of its rankings by seed."""
    methods = asked_methods(check_config(study["config"], FILE))
    known = [one for one in methods if any(one.name == method["name"] for method in study["methods"])]
    ranking = [one for one in known if one.kind in RANKINGS and one.config.search.direction != "random"]
    ranking.sort(key=lambda method: method.name != study["reference"])
    seeds = study["seeds"]
    return [(one, [ranking_name(owner_of(known, one, seed), seed) for seed in seeds]) for one in ranking]


def _without(paths: Sequence[Path]) -> Samples:
    missing = next(path for path in paths if not path.exists())
    return Samples([f"The samples are unknown: found no {'/'.join(missing.parts[-3:])}."], [])


def _read(output: Path, name: str, kind: str, direction: str) -> _Seed:
    file, masks = traces_file(output, name), read_masks(index_file(output, name))[0]
    traces, start, fewest = read_json(file, "list of traces"), masks.start, masks.fewest
    try:
        flags, altered = traces.get("altered"), None
        if flags is not None and 0 < sum(flags) < len(flags):
            altered = fmean(flags), fmean(flags[place] for place in traces["order"][: fewest.samples])
        found = {one.name: one for one in ranking_relations(traces, direction, kind)[1]}
        return _Seed(found, altered, start, fewest, masks.masks[start], masks.masks[fewest])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"not the traces of a search: {type(error).__name__} {error}", where=file) from error


def _described(output: Path, method: Method, seeds: list[_Seed]) -> Samples:
    size, few = f"{seeds[0].start.samples:,}", f"{seeds[0].fewest.samples:,}"
    drawn = "For one seed" if len(seeds) == 1 else f"For each of {len(seeds)} seeds"
    means = "" if len(seeds) == 1 else "; figures are means over the seeds"
    shared = [name for name in seeds[0].relations if all(name in seed.relations for seed in seeds)]
    of_seeds = [[seed.relations[name] for seed in seeds] for name in shared]
    related = [_mean(found) for found in of_seeds]
    rows = [
        _row(f"ranking and {mean.name}", mean.measure, [one.value for one in found], by_chance(mean))
        for mean, found in zip(related, of_seeds, strict=True)
    ]
    altered = [seed.altered for seed in seeds if seed.altered is not None]
    if altered:
        pool, first = ([shares[place] for shares in altered] for place in (0, 1))
        rows.append(_row(f"altered ones of all {size} samples", "share", pool))
        rows.append(_row(f"altered ones of the first {few}", "share", first, percent(fmean(pool))))
    pool_masks = {str(place): load_mask(output, seed.pool_mask) for place, seed in enumerate(seeds)}
    params = seeds[0].start.params
    between = overlaps(pool_masks, params)
    chance = percent(between.chance)
    if few != size:
        firsts = [
            overlaps({"pool": mask, "first": load_mask(output, seed.first_mask)}, params).shares[0][1]
            for seed, mask in zip(seeds, pool_masks.values(), strict=True)
        ]
        rows.append(_row(f"masks of the first {few} and of all", "shared entries", firsts, chance))
    if len(seeds) > 1:
        pairs = [between.shares[a][b] for a, b in itertools.combinations(range(len(seeds)), 2)]
        rows.append(_row("masks of all, of two seeds", "shared entries", pairs, chance))
    drawn = f"{drawn} {size} samples were drawn, and ranked as for {method.label}{means}."
    measures = list(dict.fromkeys(mean.measure for mean in related))
    return Samples([drawn, headline(related, "ranking")], rows, measures)


def _with_texts(found: Samples, config: RunConfig, file: Path) -> Samples:
    """Add the samples of one seed with the largest and the smallest traces."""
    traces = read_json(file, "list of traces")
    top, lowest = extremes(traces)
    texts = texts_of(config, traces, [one["place"] for one in (*top, *lowest)])
    return replace(found, top=with_texts(top, texts), lowest=with_texts(lowest, texts), missing=texts.missing)


def _mean(found: list[Relation]) -> Relation:
    """The mean over the seeds; its strength is 0 if chance may explain any seed."""
    lows, highs = zip(*(one.chance for one in found), strict=True)
    held = [one.held for one in found if one.held is not None]
    return replace(
        found[0],
        value=fmean(one.value for one in found),
        chance=(min(lows), max(highs)),
        strength=fmean(one.strength for one in found) if all(one.strength for one in found) else 0.0,
        held=fmean(held) if len(held) == len(found) else None,
    )


def _row(name: str, measure: str, values: Sequence[float], chance: str = "") -> list[str]:
    def shown(value: float) -> str:
        if measure in ("share", "shared entries"):
            return percent(value)
        return f"{value:+.2f}" if measure == "Spearman" else f"{value:.2f}"

    span = f"{shown(min(values))} to {shown(max(values))}" if len(values) > 1 else "-"
    return [name, measure, shown(fmean(values)), span, chance]
