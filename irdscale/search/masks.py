"""The masks of a search on disk: computed once, and read again when the search goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from irdscale.config.loader import same_search
from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import failing_together, rank_and_world
from irdscale.errors import InputError
from irdscale.fisher.pool import ranked_entries, ranked_samples, saved_pass, scored_by, traces_of
from irdscale.fisher.scores import reads_samples
from irdscale.masks.mask import Mask
from irdscale.search.ird import Pair
from irdscale.search.limits import reachable_sizes, smallest_pair
from irdscale.search.mask_store import SearchMasks, as_stored, index_file, keep_mask, load_mask, read_masks, traces_file
from irdscale.training.mask_passes import MaskPass, kept_earlier, make_mask, mask_pass
from irdscale.utils.files import digest, read_json, write_json

if TYPE_CHECKING:
    from irdscale.tasks import Task


def search_masks(config: RunConfig, task: Task, output: Path, progress: bool, name: str = "") -> SearchMasks:
    """All masks that the search can reach, from a trace pass and an accumulation pass, or from an earlier run.

    A forward pass takes the samples' losses, for the report on what their traces follow.

    Args:
        name: name of the search, if several share an output folder.

    Raises:
        InputError: the configuration does not fit the model, or a file of an earlier run is damaged.
    """
    earlier = stored_masks(config, output, name)
    if earlier is not None:
        return earlier
    with mask_pass(config, task, config.fisher.samples, "pool", progress) as drawn:
        return _make_masks(config, task, output, progress, name, drawn)


def _make_masks(config: RunConfig, task: Task, output: Path, progress: bool, name: str, drawn: MaskPass) -> SearchMasks:
    samples, pool, start = drawn.samples, drawn.places, Pair(len(drawn.places), drawn.k)
    minimum = smallest_pair(config, start, drawn.parameters)
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
        # One sample set at a time: all masks together may not fit in memory.
        found = {Pair(s, p): rankings[s].prefix(p) for p in ks}
        hashes |= {pair: mask.hash for pair, mask in found.items()}
        with failing_together():
            if rank_and_world()[0] == 0:
                for mask in found.values():
                    keep_mask(mask, output)
    facts = {**drawn.facts(), "head": drawn.head, "scored_by": scored_by(config, task)}
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
    """The masks of an earlier run of this search, on every rank; None if there are none.

    Raises:
        InputError: a file is damaged.
    """
    index = index_file(output, name)
    return kept_earlier(index, partial(_find_masks, config, output, index))


def _find_masks(config: RunConfig, output: Path, index: Path) -> SearchMasks | None:
    """The masks in `index`; None if another configuration made them, in a run that never began its search."""
    read, made_by = read_masks(index)
    if made_by != _made_by(config):
        return None
    for mask in set(read.masks.values()):
        load_mask(output, mask)
    return read


def _made_by(config: RunConfig) -> str:
    return digest(same_search(config.model_dump(mode="json")))


def _state(of: str, name: str) -> str:
    """Name of a pass's saved state, in the search of this name."""
    return f"{name}-{of}" if name else of


def random_draw_mask(
    config: RunConfig, task: Task, output: Path, pair: Pair, progress: bool, name: str = "", purpose: str = "fish"
) -> dict[str, Any]:
    """The FISH mask: `pair.params` entries from `pair.samples` samples drawn at random from the population.

    Args:
        name: name of the search, if several share an output folder.
        purpose: name of the draw, which tells it from others of the same size.

    Returns:
        {"mask", "sample_gradients", "seconds"}, from an earlier run if there is one.
    """
    draw = f"random-{pair.samples}-{pair.params}"
    state = _state(draw, name)

    def make() -> tuple[Mask, dict[str, Any]]:
        mask, drawn = make_mask(config, task, pair.samples, purpose, state, progress, k=pair.params)
        return mask, {key: drawn.facts()[key] for key in ("sample_gradients", "seconds")}

    stored = _stored_mask(output, output / "fisher" / name / f"{draw}.json", make)
    saved_pass(config, state).remove()
    return stored


def drawn_mask(config: RunConfig, task: Task, output: Path, name: str) -> tuple[str, int]:
    """Hash and entries of the mask of K entries by `fisher.score`, from an earlier run if there is one.

    The samples, if the score reads any, are those of the pool.

    Args:
        name: name of the draw, for its file.
    """
    count, scoring = config.fisher.samples, config
    if not reads_samples(config.fisher.score):
        # The head is not scored, so its warm-up would change nothing.
        count, scoring = 1, config.model_copy(update={"fisher": config.fisher.model_copy(update={"head_warmup": 0})})

    def make() -> tuple[Mask, dict[str, Any]]:
        mask, drawn = make_mask(scoring, task, count, "pool", name, progress=False)
        return mask, {"params": drawn.k}

    stored = _stored_mask(output, output / "fisher" / f"{name}.json", make)
    saved_pass(scoring, name).remove()
    return stored["mask"], stored["params"]


def _stored_mask(output: Path, file: Path, make: Callable[[], tuple[Mask, dict[str, Any]]]) -> dict[str, Any]:
    """Hash ("mask") and facts of a mask, from `file` if an earlier run wrote it, else made and written; collective."""

    def find() -> dict[str, Any]:
        stored = read_json(file, "record of a mask")
        if not isinstance(stored, dict) or not isinstance(stored.get("mask"), str) or len(stored) < 2:
            raise InputError("not the record of a mask", "the file deleted, to make it again", where=file)
        load_mask(output, stored["mask"])
        return stored

    earlier = kept_earlier(file, find)
    if earlier is not None:
        return earlier
    mask, facts = make()
    stored = {"mask": mask.hash, **facts}
    with failing_together():
        if rank_and_world()[0] == 0:
            keep_mask(mask, output)
            write_json(file, stored)
    return stored
