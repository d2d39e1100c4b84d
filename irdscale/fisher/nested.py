"""All masks of a search from one ranking of the samples and one accumulation pass.

Every sample set of a search is a prefix of one ranking, so one pass over the ranked samples gives the scores (the
Fisher information, by default) of every prefix. Every smaller mask is a prefix of the ranked entries.

If the sums of all parameters do not fit in memory together, each group of parameters takes a pass of its own, with its
gradients alone. A group is a run of parameters in the model's order, such as some of its layers. Its sums equal those
of one pass over all parameters bit for bit.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from irdscale.config.schema import Scope, Score
from irdscale.distributed.ranks import rank_and_world
from irdscale.fisher.accumulate import new_sums
from irdscale.fisher.activations import input_sizes
from irdscale.fisher.checkpoint import SavedPass
from irdscale.fisher.diagonal import Fisher, Layout
from irdscale.fisher.passes import SampleGradients
from irdscale.fisher.scores import OF_INPUTS, entry_scores, summed
from irdscale.masks.mask import Candidates, Ranking, candidates_of, rank_entries, ranking_of

log = logging.getLogger(__name__)


def rank_samples(values: Tensor, direction: str, seed: int) -> list[int]:
    """Places 0..N-1 of the ranked samples; the first s are the sample set of size s.

    `ird` ranks the largest values first and `reverse` the smallest, with ties in data order. `random` is a seeded
    shuffle, as FISH draws its samples.

    Args:
        values: [N], such as the samples' Fisher traces
    """
    if direction == "random":
        order = list(range(len(values)))
        random.Random(seed).shuffle(order)
        return order
    return values.sort(descending=direction != "reverse", stable=True).indices.tolist()


def ranked_entries_by_prefix(
    samples: SampleGradients,
    order: Sequence[int],
    sizes: Sequence[int],
    k: int,
    *,
    score: Score = "fisher",
    scope: Scope = "global",
    groups: Sequence[Sequence[str]] = (),
    traces: Tensor | None = None,
    progress: bool = False,
    saved: Sequence[SavedPass] = (),
    **options: Any,
) -> dict[int, Ranking]:
    """For each s in `sizes`, the k entries with the largest scores over the first s ordered samples.

    It takes one accumulation pass over the first max(sizes) samples, of forward passes alone for a score of inputs, and
    none for a score that reads no samples. Sums are ranked, which rank entries as their means do. Collective; all ranks
    get the same rankings.

    Args:
        scope: `global`, or `layerwise`, in proportion to each parameter's size (see `rank_entries`)
        groups: names of the scored parameters in groups, in their order, each of which takes a pass of its own
        traces: float64 [N], to which each visited sample's Fisher trace is added
        saved: saves the state of the pass, or of each group's, and its finished rankings
        options: `dtype`, `layout` and `offload` of the sums, as in `accumulate_fisher`
    """
    options |= {"layout": options.get("layout", "replicated") if rank_and_world()[1] > 1 else "replicated"}
    if summed(score) is None:
        if traces is not None:
            samples.add_traces(order[: max(sizes)], traces, progress=progress)
        if score in OF_INPUTS:
            of = input_sizes(samples, order, sizes, score, progress=progress, **options)
            return {s: rank_entries(_scores(samples, score, of[s], **options), k, scope) for s in sizes}
        return dict.fromkeys(sizes, rank_entries(_scores(samples, score, {}, **options), k, scope))
    found: dict[int, list[Candidates]] = {size: [] for size in sizes}
    ranked = partial(candidates_of, k=k, scope=scope, shapes=samples.shapes)
    if len(groups) < 2:
        groups = [list(samples.scored)]
    elif rank_and_world()[0] == 0:
        log.info("fisher.passes: %d passes over the samples, each with the sums of some parameters", len(groups))
    states: Sequence[SavedPass | None] = saved or [None] * len(groups)
    for place, (names, state) in enumerate(zip(groups, states, strict=True)):
        part, description = samples, "Masks"
        if len(groups) > 1:
            part = replace(samples, scored={name: samples.scored[name] for name in names}, taken=0)
            description = f"Masks {place + 1}/{len(groups)}"
        run = {"traces": traces, "progress": progress, "description": description}
        for size, candidates in _candidates(part, order, sizes, score, ranked, options, state, **run).items():
            found[size].append(candidates)
        samples.taken += part.taken if part is not samples else 0
    for one in saved if len(groups) > 1 else ():
        one.remove()
    return {size: ranking_of(found.pop(size), k, scope, samples.shapes) for size in sizes}


def _candidates(
    samples: SampleGradients,
    order: Sequence[int],
    sizes: Sequence[int],
    score: Score,
    ranked: Callable[[Fisher], Candidates],
    options: dict[str, Any],
    saved: SavedPass | None,
    **run: Any,
) -> dict[int, Candidates]:
    """The candidates at each size of sample sets, from one accumulation pass."""
    add = summed(score)
    assert add is not None, "a score that reads no samples has no sums"
    sums = new_sums(samples, order, add=add, **options)
    found: dict[int, Candidates] = {}

    def snapshot(size: int) -> None:
        found[size] = ranked(_scores(samples, score, sums.tensors, **options))
        if saved is not None:
            saved.save_result(f"candidates-{size}", found[size].tensors())

    samples.accumulate(order[: max(sizes)], sums, boundaries=sizes, at_boundary=snapshot, saved=saved, **run)
    for size in sizes:
        if size not in found:
            assert saved is not None, "only a continued pass skips a boundary"
            found[size] = Candidates.of_tensors(saved.load_result(f"candidates-{size}"))
    return found


def _scores(samples: SampleGradients, score: Score, sums: dict[str, Tensor], layout: Layout, **_: Any) -> Fisher:
    scores = entry_scores(score, samples.scored, sums, samples.seed, layout)
    return Fisher(scores, torch.zeros(0, dtype=torch.float64), 0, layout, samples.shapes)
