"""The masks of a search on disk: computed once, found again when the search goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from irdscale.config import RunConfig, same_search
from irdscale.errors import InputError
from irdscale.files import digest, read_json, write_json
from irdscale.fisher.lattice import rank_samples, ranked_entries_by_prefix
from irdscale.fisher.pool import (
    draw_samples,
    mask_size,
    pass_options,
    sample_gradients,
    saved_pass,
    scored_by,
    traces_of,
)
from irdscale.mask import Mask
from irdscale.partitioned import numel_of
from irdscale.ranks import failing_together, first_says, rank_and_world
from irdscale.search.ird import Pair, lattice
from irdscale.tasks import build_model
from irdscale.training import trained_whole

if TYPE_CHECKING:
    from irdscale.tasks import Task


@dataclass(frozen=True)
class SearchMasks:
    """Where a search starts and ends, and the hash of the mask of every pair in between.

    Attributes:
        facts: parameters of the model, scored ones and which they are, the head's, sample gradients taken, seconds.
    """

    start: Pair
    minimum: Pair
    masks: dict[Pair, str]
    facts: dict[str, Any]


def mask_folder(output: Path, mask_hash: str) -> Path:
    """Where a mask of this hash is kept."""
    return output / "masks" / mask_hash


def smallest_pair(config: RunConfig, start: Pair, parameters: int) -> Pair:
    """The pair below which no candidate of a search from `start` goes, in a model of so many parameters."""
    min_ratio = config.search.min_ratio if config.search.min_ratio is not None else config.search.ratio / 8
    return Pair(config.search.min_samples, min(start.params, max(1, round(min_ratio * parameters))))


def search_masks(config: RunConfig, task: Task, output: Path, progress: bool) -> SearchMasks:
    """Every mask of the lattice: a trace pass and an accumulation pass, or what an earlier run wrote.

    The samples' losses, which say what their traces follow, take a forward pass.

    Raises:
        InputError: the configuration does not fit the model, or the files of an earlier run are damaged.
    """
    earlier = stored_masks(config, output)
    if earlier is not None:
        return earlier
    started = time.perf_counter()
    with failing_together():
        model, new = build_model(config, task, config.search.seeds[0])
        whole = trained_whole(config, model, new)
        pool = draw_samples(config, task, config.fisher.samples, "pool")
        samples = sample_gradients(config, task, model, pool, whole)
        scored = sum(map(numel_of, samples.scored.values()))
        total = sum(map(numel_of, model.parameters()))
        start = Pair(len(pool), mask_size(config, model, scored))
    minimum = smallest_pair(config, start, total)
    sizes, ks = lattice(start, minimum)
    traces = torch.zeros(len(pool), dtype=torch.float64)
    shuffled = config.search.direction == "random"
    if not shuffled:
        samples.add_traces(range(len(pool)), traces, progress=progress, saved=saved_pass(config, "traces"))
    losses = samples.label_losses([len(ids) for ids in task.train.select(pool)["input_ids"]])
    order = rank_samples(traces, config.search.direction, config.task.split_seed)
    rankings = ranked_entries_by_prefix(
        samples,
        order,
        sizes,
        start.params,
        traces=traces if shuffled else None,
        progress=progress,
        saved=saved_pass(config, "masks"),
        **pass_options(config),
    )
    names = dict(model.named_parameters())
    found = {Pair(s, p): rankings[s].prefix(p) for s in sizes for p in ks}
    facts = {
        "parameters": total,
        "scored": scored,
        "head": sum(numel_of(names[name]) for name in whole),
        "scored_by": scored_by(config, task),
        "sample_gradients": samples.taken,
        "seconds": round(time.perf_counter() - started, 2),
    }
    masks = SearchMasks(start, minimum, {pair: mask.hash for pair, mask in found.items()}, facts)
    with failing_together():
        if rank_and_world()[0] == 0:
            for mask in found.values():
                keep_mask(mask, output)
            told = {**traces_of(task, pool, traces), "loss": losses.tolist(), "order": order}
            write_json(output / "fisher" / "traces.json", told)
            write_json(_index(output), {**_stored(masks), "made_by": _made_by(config)})
            for name in ("traces", "masks"):
                saved_pass(config, name).remove()
    return masks


def stored_masks(config: RunConfig, output: Path) -> SearchMasks | None:
    """The masks of an earlier run of this search, on every rank; None where there are none.

    Raises:
        InputError: the files are damaged.
    """
    index = _index(output)
    with failing_together():
        earlier = _read(index, output, _made_by(config)) if index.exists() else None
    if not first_says(earlier is not None):
        return None
    if earlier is None:
        raise InputError(f"{index}: not found on this rank; expected an output folder that all ranks share")
    return earlier


def _index(output: Path) -> Path:
    return output / "fisher" / "masks.json"


def _made_by(config: RunConfig) -> str:
    return digest(same_search(config.model_dump(mode="json")))


def _stored(masks: SearchMasks) -> dict[str, Any]:
    return {
        "start": [masks.start.samples, masks.start.params],
        "minimum": [masks.minimum.samples, masks.minimum.params],
        "masks": [[pair.samples, pair.params, mask] for pair, mask in masks.masks.items()],
        "facts": masks.facts,
    }


def _read(index: Path, output: Path, made_by: str) -> SearchMasks | None:
    """The masks of an earlier run; None if another configuration, of a run that began no search, made them."""
    stored = read_json(index, "list of masks")
    try:
        if stored["made_by"] != made_by:
            return None
        masks = {Pair(s, p): str(mask) for s, p, mask in stored["masks"]}
        read = SearchMasks(Pair(*stored["start"]), Pair(*stored["minimum"]), masks, dict(stored["facts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{index}: not a list of masks: no valid {error}; delete the folder to start anew") from error
    for mask in set(masks.values()):
        if Mask.load(mask_folder(output, mask)).hash != mask:
            raise InputError(f"{mask_folder(output, mask)}: found another mask; expected the one of this hash")
    return read


def keep_mask(mask: Mask, output: Path) -> str:
    """Save a mask under its hash, once; returns the hash."""
    folder = mask_folder(output, mask.hash)
    if not folder.exists():
        mask.save(folder)
    return mask.hash


def random_draw_mask(config: RunConfig, task: Task, output: Path, pair: Pair, progress: bool) -> dict[str, Any]:
    """The FISH mask: `pair.params` entries by `pair.samples` samples drawn at random from the whole train split.

    Returns:
        {"mask", "sample_gradients", "seconds"}, from an earlier run where there is one for this pair.
    """
    file = output / "fisher" / f"random-{pair.samples}-{pair.params}.json"
    if first_says(file.exists()):
        with failing_together():
            stored = read_json(file, "mask of random samples")
            if not isinstance(stored, dict) or not {"mask", "sample_gradients", "seconds"} <= set(stored):
                raise InputError(f"{file}: not a mask of random samples; delete it to have it made again")
            Mask.load(mask_folder(output, stored["mask"]))
        return stored
    started = time.perf_counter()
    with failing_together():
        model, new = build_model(config, task, config.search.seeds[0])
        places = draw_samples(config, task, pair.samples, "fish")
        samples = sample_gradients(config, task, model, places, trained_whole(config, model, new))
    ranking = ranked_entries_by_prefix(
        samples,
        range(len(places)),
        [pair.samples],
        pair.params,
        progress=progress,
        saved=saved_pass(config, "random"),
        **pass_options(config),
    )[pair.samples]
    mask = ranking.prefix(pair.params)
    stored = {
        "mask": mask.hash,
        "sample_gradients": samples.taken,
        "seconds": round(time.perf_counter() - started, 2),
    }
    with failing_together():
        if rank_and_world()[0] == 0:
            keep_mask(mask, output)
            write_json(file, stored)
            saved_pass(config, "random").remove()
    return stored
