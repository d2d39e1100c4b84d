"""Read the files of a finished search for its report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irdscale.errors import InputError
from irdscale.masks.mask import Mask, density
from irdscale.report.analysis import Analysis, analyse
from irdscale.report.mask_overlap import LAYER
from irdscale.report.sample_texts import Texts, read_texts
from irdscale.search.ird import Pair, candidates
from irdscale.search.ledger import read_ledger
from irdscale.search.mask_store import index_file, load_mask, read_masks, traces_file
from irdscale.utils.files import read_json


@dataclass(frozen=True)
class Candidate:
    """One candidate of one round.

    Attributes:
        metrics: seed -> selection metric; None if the evaluation failed.
        mean: mean over the seeds; None if one failed.
        chosen: whether the search moved to it.
        shared: whether it has the mask, and so the metrics, of a pair evaluated before.
    """

    round: int
    samples: int
    params: int
    metrics: dict[int, float | None]
    mean: float | None
    chosen: bool
    shared: bool


@dataclass(frozen=True)
class Facts:
    """Everything a report shows.

    Attributes:
        result: contents of result.json.
        rounds: candidates of every round, in order.
        failures: "samples, parameters, seed: error" of each evaluation that failed and never succeeded.
        traces: Fisher trace of each pool sample, largest first, and whether the winner's mask is made from it.
        layers: layer -> module -> share of its parameters in the winner's mask.
        others: name, entries in the mask, size, share of each parameter outside the numbered layers.
        analysis: analysis of the ranking of the samples and of the masks.
        texts: texts of the samples that the analysis lists.
    """

    result: dict[str, Any]
    rounds: list[Candidate]
    failures: list[str]
    traces: list[tuple[float, bool]]
    layers: dict[int, dict[str, float]]
    others: list[tuple[str, int, int, float]]
    analysis: Analysis
    texts: Texts


def finished(output: Path) -> dict[str, Any]:
    """The result of a finished search.

    Raises:
        InputError: the folder has none, or it is damaged.
    """
    if not (output / "result.json").exists():
        records = read_ledger(output / "ledger.jsonl")
        done = sum(record["status"] == "ok" for record in records)
        found = f"a search with {done} evaluations done" if records else "no search"
        raise InputError(f"found {found}", "a finished one: run irdscale search", where=output)
    result: dict[str, Any] = read_json(output / "result.json", "result of a search")
    if isinstance(result, dict) and "kept_step" in result:
        raise InputError("found a training", "a finished search: run irdscale search", where=output)
    return result


def gather(output: Path) -> Facts:
    """Read a finished search.

    Raises:
        InputError: there is no finished search in the folder, or its files are damaged.
    """
    result = finished(output)
    records = read_ledger(output / "ledger.jsonl")
    try:
        stored = read_masks(index_file(output))[0]
        traces = read_json(traces_file(output), "list of traces")
        kept = set(traces["order"][: result["best"]["samples"]])
        ranked = sorted(((t, i in kept) for i, t in enumerate(traces["trace"])), reverse=True)
        layers, others = _density(load_mask(output, Path(result["best"]["mask"]).name))
        analysis = analyse(output, result, traces, stored.masks)
        listed = [*analysis.top, *analysis.lowest, *(analysis.drivers.top if analysis.drivers else [])]
        return Facts(
            result,
            _rounds(result, records, stored.masks, stored.minimum),
            _failures(records),
            ranked,
            layers,
            others,
            analysis,
            read_texts(result, traces, [one["place"] for one in listed], output),
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        fault = f"not the output of a search: {type(error).__name__} {error}"
        raise InputError(fault, where=output) from error


def _rounds(
    result: dict[str, Any], records: list[dict[str, Any]], masks: dict[Pair, str], minimum: Pair
) -> list[Candidate]:
    seeds = result["config"]["search"]["seeds"]
    metrics = {(r["mask"], r["seed"]): r["metric"] for r in records if r["status"] == "ok"}
    recorded = {(r["samples"], r["params"], r["mask"]) for r in records if r["round"] is not None}
    path = [Pair(step["samples"], step["params"]) for step in result["path"]]
    last = max(r["round"] for r in records if r["round"] is not None)
    listed = []
    for number in range(max(last, len(path) - 1) + 1):
        pairs = [path[0]] if number == 0 else candidates(path[number - 1], minimum)
        for pair in pairs:
            found = {seed: metrics.get((masks[pair], seed)) for seed in seeds}
            values = [value for value in found.values() if value is not None]
            listed.append(
                Candidate(
                    number,
                    pair.samples,
                    pair.params,
                    found,
                    sum(values) / len(values) if len(values) == len(seeds) else None,
                    number < len(path) and path[number] == pair,
                    (pair.samples, pair.params, masks[pair]) not in recorded,
                )
            )
    return listed


def _failures(records: list[dict[str, Any]]) -> list[str]:
    done = {r["key"] for r in records if r["status"] == "ok"}
    failed = {r["key"]: r for r in records if r["key"] not in done}
    return [
        f"{r['samples']} samples, {r['params']} parameters, seed {r['seed']}: {r['error']}" for r in failed.values()
    ]


def _density(mask: Mask) -> tuple[dict[int, dict[str, float]], list[tuple[str, int, int, float]]]:
    entries: dict[tuple[int, str], list[int]] = {}
    others = []
    for name, share in density(mask).items():
        size = math.prod(mask.shapes[name])
        held = round(share * size)
        layered = LAYER.match(name)
        if layered:
            module = layered[3].rsplit(".", 1)[0] if "." in layered[3] else layered[3]
            cell = entries.setdefault((int(layered[2]), module), [0, 0])
            cell[0] += held
            cell[1] += size
        else:
            others.append((name, held, size, share))
    layers: dict[int, dict[str, float]] = {}
    for (layer, module), (held, size) in sorted(entries.items(), key=lambda item: item[0][0]):
        layers.setdefault(layer, {})[module] = held / size
    return layers, others
