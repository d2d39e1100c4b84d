"""The masks of a search on disk: computed once, found again when the search goes on."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from irdscale.config.loader import same_search
from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import broadcast_flag, failing_together, rank_and_world
from irdscale.distributed.zero3 import numel_of
from irdscale.errors import InputError
from irdscale.fisher.nested import ranked_entries_by_prefix
from irdscale.fisher.pool import (
    draw_samples,
    mask_size,
    pass_options,
    ranked_entries,
    ranked_samples,
    sample_gradients,
    saved_pass,
    scored_by,
    traces_of,
)
from irdscale.search.ird import Pair
from irdscale.search.limits import reachable_sizes, smallest_pair
from irdscale.search.mask_store import SearchMasks, as_stored, index_file, keep_mask, load_mask, read_masks, traces_file
from irdscale.training.base_model import base_model
from irdscale.training.head_warmup import model_to_score
from irdscale.training.trainer import trained_densely
from irdscale.utils.files import digest, read_json, write_json

if TYPE_CHECKING:
    from irdscale.tasks import Task


def search_masks(config: RunConfig, task: Task, output: Path, progress: bool, name: str = "") -> SearchMasks:
    """Every mask that the search can reach: a trace pass and an accumulation pass, or what an earlier run wrote.

    The samples' losses, which say what their traces follow, take a forward pass.

    Args:
        name: of the search, where several have one output folder.

    Raises:
        InputError: the configuration does not fit the model, or the files of an earlier run are damaged.
    """
    earlier = stored_masks(config, output, name)
    if earlier is not None:
        return earlier
    started = time.perf_counter()
    with model_to_score(config, task, progress) as (model, dense):
        return _made_masks(config, task, output, progress, name, model, dense, started)


def _made_masks(
    config: RunConfig,
    task: Task,
    output: Path,
    progress: bool,
    name: str,
    model: nn.Module,
    dense: list[str],
    started: float,
) -> SearchMasks:
    with failing_together():
        pool = draw_samples(config, task, config.fisher.samples, "pool")
        samples = sample_gradients(config, task, model, pool, dense)
        scored = sum(map(numel_of, samples.scored.values()))
        total = sum(map(numel_of, model.parameters()))
        start = Pair(len(pool), mask_size(config, model, scored))
    minimum = smallest_pair(config, start, total)
    sizes, ks = reachable_sizes(start, minimum)
    state = _state("masks", name)
    saved_traces = saved_pass(config, f"{state}-traces")
    traces = torch.zeros(len(pool), dtype=torch.float64)
    if config.traced:
        samples.add_traces(range(len(pool)), traces, progress=progress, saved=saved_traces)
    losses = samples.label_losses([len(ids) for ids in task.population.select(pool)["input_ids"]])
    order = ranked_samples(config, task, samples, traces, losses)
    unknown = None if config.traced else traces
    rankings = ranked_entries(config, samples, order, sizes, start.params, state, traces=unknown, progress=progress)
    hashes: dict[Pair, str] = {}
    for s in sizes:
        # One set's at a time: the masks of all can be many.
        found = {Pair(s, p): rankings[s].prefix(p) for p in ks}
        hashes |= {pair: mask.hash for pair, mask in found.items()}
        with failing_together():
            if rank_and_world()[0] == 0:
                for mask in found.values():
                    keep_mask(mask, output)
    names = dict(model.named_parameters())
    facts = {
        "parameters": total,
        "scored": scored,
        "head": sum(numel_of(names[name]) for name in dense),
        "scored_by": scored_by(config, task),
        "sample_gradients": samples.taken,
        "seconds": round(time.perf_counter() - started, 2),
    }
    masks = SearchMasks(start, minimum, hashes, facts)
    with failing_together():
        if rank_and_world()[0] == 0:
            found_traces = {**traces_of(task, pool, traces), "loss": losses.tolist(), "order": order}
            write_json(traces_file(output, name), found_traces)
            write_json(index_file(output, name), as_stored(masks, _made_by(config)))
            saved_traces.remove()
            saved_pass(config, state).remove()
    return masks


def stored_masks(config: RunConfig, output: Path, name: str = "") -> SearchMasks | None:
    """The masks of an earlier run of this search, on every rank; None where there are none.

    Raises:
        InputError: the files are damaged.
    """
    index = index_file(output, name)
    with failing_together():
        earlier = _made_earlier(config, output, index) if index.exists() else None
    if not broadcast_flag(earlier is not None):
        return None
    if earlier is None:
        raise InputError(f"{index}: not found on this rank; expected an output folder that all ranks share")
    return earlier


def _state(of: str, name: str) -> str:
    """Where the state of a pass is kept, of the search of this name."""
    return f"{name}-{of}" if name else of


def _made_by(config: RunConfig) -> str:
    return digest(same_search(config.model_dump(mode="json")))


def _made_earlier(config: RunConfig, output: Path, index: Path) -> SearchMasks | None:
    """The masks of an earlier run; None if another configuration, of a run that began no search, made them."""
    read, made_by = read_masks(index)
    if made_by != _made_by(config):
        return None
    for mask in set(read.masks.values()):
        load_mask(output, mask)
    return read


def random_draw_mask(
    config: RunConfig, task: Task, output: Path, pair: Pair, progress: bool, name: str = "", purpose: str = "fish"
) -> dict[str, Any]:
    """The FISH mask: `pair.params` entries by `pair.samples` samples drawn at random from the whole population.

    Args:
        name: of the search, where several have one output folder.
        purpose: tells this draw from others of the same size.

    Returns:
        {"mask", "sample_gradients", "seconds"}, from an earlier run where there is one for this pair.
    """
    file = output / "fisher" / name / f"random-{pair.samples}-{pair.params}.json"
    if broadcast_flag(file.exists()):
        with failing_together():
            stored = read_json(file, "mask of random samples")
            if not isinstance(stored, dict) or not {"mask", "sample_gradients", "seconds"} <= set(stored):
                raise InputError(f"{file}: not a mask of random samples; delete it to have it made again")
            load_mask(output, stored["mask"])
        return stored
    started = time.perf_counter()
    with model_to_score(config, task, progress) as (model, dense):
        with failing_together():
            places = draw_samples(config, task, pair.samples, purpose)
            samples = sample_gradients(config, task, model, places, dense)
        state = _state(f"random-{pair.samples}-{pair.params}", name)
        sizes = [pair.samples]
        rankings = ranked_entries(config, samples, range(len(places)), sizes, pair.params, state, progress=progress)
        mask = rankings[pair.samples].prefix(pair.params)
        taken = samples.taken
    stored = {
        "mask": mask.hash,
        "sample_gradients": taken,
        "seconds": round(time.perf_counter() - started, 2),
    }
    with failing_together():
        if rank_and_world()[0] == 0:
            keep_mask(mask, output)
            write_json(file, stored)
            saved_pass(config, state).remove()
    return stored


def drawn_mask(config: RunConfig, task: Task, output: Path, name: str) -> tuple[str, int]:
    """Hash and entries of the mask of K entries by a score that reads no samples, from an earlier run if there is one.

    Args:
        name: of the draw, for its file.
    """
    file = output / "fisher" / f"{name}.json"
    if broadcast_flag(file.exists()):
        with failing_together():
            stored = read_json(file, "drawn mask")
            if not isinstance(stored, dict) or not {"mask", "params"} <= set(stored):
                raise InputError(f"{file}: not a drawn mask; delete it to have it made again")
            load_mask(output, stored["mask"])
        return stored["mask"], stored["params"]
    with ExitStack() as lent:
        with failing_together():
            model, new = lent.enter_context(base_model(config, task, config.search.seeds[0]))
            samples = sample_gradients(config, task, model, [0], trained_densely(config, model, new))
            k = mask_size(config, model, sum(map(numel_of, samples.scored.values())))
        mask = ranked_entries_by_prefix(samples, [0], [1], k, **pass_options(config))[1].prefix(k)
    with failing_together():
        if rank_and_world()[0] == 0:
            keep_mask(mask, output)
            write_json(file, {"mask": mask.hash, "params": k})
    return mask.hash, k
