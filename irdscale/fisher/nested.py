"""All masks of a search from one ranking of the samples and one accumulation pass.

Every sample set of a search is a prefix of one ranking, so one pass over the ranked samples gives the scores (the
Fisher information, by default) of every prefix. Every smaller mask is a prefix of the ranked entries.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

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
from irdscale.masks.mask import Ranking, rank_entries


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
    dtype: torch.dtype = torch.float32,
    layout: Layout = "replicated",
    offload: bool = False,
    traces: Tensor | None = None,
    progress: bool = False,
    saved: SavedPass | None = None,
) -> dict[int, Ranking]:
    """For each s in `sizes`, the k entries with the largest scores over the first s ordered samples.

    It takes one pass over the first max(sizes) samples, forwards alone for a score of inputs, and none for one that
    reads no samples. Sums are ranked, which rank entries as means do. Collective; all ranks get the same rankings.

    Args:
        scope: `global`, or `layerwise`, in proportion to each parameter's size (see `rank_entries`)
        layout, offload: options of the sums, as in `accumulate_fisher`
        traces: float64 [N], to which each visited sample's Fisher trace is added
        saved: saves the state of the pass and its finished rankings
    """
    add = summed(score)
    if rank_and_world()[1] == 1:
        layout = "replicated"
    if add is None:
        if traces is not None:
            samples.add_traces(order[: max(sizes)], traces, progress=progress)
        if score not in OF_INPUTS:
            return dict.fromkeys(sizes, _ranking(samples, score, {}, layout, k, scope))
        found = input_sizes(samples, order, sizes, score, dtype, layout, offload, progress)
        return {size: _ranking(samples, score, found[size], layout, k, scope) for size in sizes}
    sums = new_sums(samples, order, layout=layout, dtype=dtype, add=add, offload=offload)
    rankings: dict[int, Ranking] = {}

    def snapshot(size: int) -> None:
        ranking = _ranking(samples, score, sums.tensors, layout, k, scope)
        rankings[size] = ranking
        if saved is not None:
            saved.save_result(f"ranking-{size}", {"parameter": ranking.parameter, "index": ranking.index})

    samples.accumulate(
        order[: max(sizes)],
        sums,
        traces,
        boundaries=sizes,
        at_boundary=snapshot,
        progress=progress,
        description="Masks",
        saved=saved,
    )
    for size in sizes:
        if size not in rankings:
            assert saved is not None, "only a continued pass skips a boundary"
            rankings[size] = Ranking(**saved.load_result(f"ranking-{size}"), shapes=samples.shapes)
    return rankings


def _ranking(
    samples: SampleGradients, score: Score, sums: dict[str, Tensor], layout: Layout, k: int, scope: Scope
) -> Ranking:
    scores = entry_scores(score, samples.scored, sums, samples.seed, layout)
    return rank_entries(Fisher(scores, torch.zeros(0, dtype=torch.float64), 0, layout, samples.shapes), k, scope)
