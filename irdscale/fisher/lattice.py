"""The masks of a whole search from one ranking of the samples and one accumulation pass.

Every sample set of a search is a prefix of one ranking, so one pass over the ranked samples holds the scores (the
Fisher information, by default) of every prefix on its way; and every mask of fewer entries is a prefix of the ranked
entries.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from irdscale.config import Score
from irdscale.fisher.accumulate import Fisher, SampleGradients, zero_sums
from irdscale.fisher.scores import entry_scores, summed
from irdscale.mask import Ranking, rank_entries


def rank_samples(traces: Tensor, direction: str, seed: int) -> list[int]:
    """Places 0..N-1 in the order in which halving keeps them: the first s are the s-sample set.

    `ird` puts the largest traces first, `reverse` the smallest, ties in data order; `random` is a seeded shuffle,
    which is how FISH draws its samples.
    """
    if direction == "random":
        order = list(range(len(traces)))
        random.Random(seed).shuffle(order)
        return order
    return traces.sort(descending=direction == "ird", stable=True).indices.tolist()


def ranked_entries_by_prefix(
    samples: SampleGradients,
    order: Sequence[int],
    sizes: Sequence[int],
    k: int,
    *,
    score: Score = "fisher",
    dtype: torch.dtype = torch.float32,
    traces: Tensor | None = None,
    progress: bool = False,
) -> dict[int, Ranking]:
    """For each s in `sizes`, the k entries with the largest scores over the first s ordered samples.

    One accumulation pass over the first max(sizes) samples, or none for a score that reads no samples. The mean over
    s and the sum order entries alike, so the sums are ranked as they stand.

    Args:
        traces: float64 [N], filled with each visited sample's trace where given.
    """
    add = summed(score)
    if add is None:
        if traces is not None:
            samples.add_traces(order[: max(sizes)], traces, progress=progress)
        ranking = _ranking(entry_scores(score, samples.scored, {}, samples.seed), k)
        return dict.fromkeys(sizes, ranking)
    sums = zero_sums(samples.scored, dtype)
    rankings: dict[int, Ranking] = {}

    def snapshot(size: int) -> None:
        rankings[size] = _ranking(entry_scores(score, samples.scored, sums, samples.seed), k)

    samples.accumulate(
        order[: max(sizes)],
        sums,
        traces,
        add=add,
        boundaries=sizes,
        at_boundary=snapshot,
        progress=progress,
        description="Masks",
    )
    return rankings


def _ranking(scores: dict[str, Tensor], k: int) -> Ranking:
    return rank_entries(Fisher(scores, torch.zeros(0, dtype=torch.float64)), k)
