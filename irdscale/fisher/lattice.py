"""The masks of a whole search from one ranking of the samples and one accumulation pass.

Every sample set of a search is a prefix of one ranking, so one pass over the ranked samples holds the scores (the
Fisher information, by default) of every prefix on its way; and every mask of fewer entries is a prefix of the ranked
entries.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from irdscale.config import Scope, Score
from irdscale.fisher.accumulate import new_sums
from irdscale.fisher.diagonal import Fisher, Layout
from irdscale.fisher.gradients import SampleGradients
from irdscale.fisher.resume import SavedPass
from irdscale.fisher.scores import entry_scores, summed
from irdscale.mask import Ranking, rank_entries
from irdscale.ranks import rank_and_world


def rank_samples(
    values: Tensor, direction: str, seed: int, *, classes: Sequence[int] | None = None, drop_top: float = 0.0
) -> list[int]:
    """Places 0..N-1 in the order in which a search keeps them: the first s are the s-sample set.

    `ird` and `both` put the largest values first, `reverse` the smallest, ties in data order; `random` is a seeded
    shuffle, which is how FISH draws its samples.

    Args:
        values: [N], such as the samples' traces.
        classes: of each sample; they take turns, so that every prefix holds them in equal number as far as they last.
        drop_top: share of the samples, those with the largest values, that comes last in either direction.
    """
    if direction == "random":
        order = list(range(len(values)))
        random.Random(seed).shuffle(order)
        return order
    order = values.sort(descending=direction != "reverse", stable=True).indices.tolist()
    count = round(drop_top * len(order))
    if direction != "reverse":
        top, kept = order[:count], order[count:]
    else:
        kept, top = order[: len(order) - count], order[len(order) - count :]
    return (kept if classes is None else _in_turns(kept, classes)) + top


def _in_turns(order: Sequence[int], classes: Sequence[int]) -> list[int]:
    """First the first of each class, then the second of each, and so on; of one turn, in the given order."""
    turns: Counter[int] = Counter()
    turn_of = {}
    for place in order:
        turn_of[place] = turns[classes[place]]
        turns[classes[place]] += 1
    return sorted(order, key=turn_of.__getitem__)


def quarters(labels: Sequence[float]) -> list[int]:
    """0 to 3 for each label: the quarter of the sorted labels that it is in, equal ones in data order."""
    found = [0] * len(labels)
    for place, i in enumerate(sorted(range(len(labels)), key=labels.__getitem__)):
        found[i] = 4 * place // len(labels)
    return found


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
    weights: Tensor | None = None,
    progress: bool = False,
    saved: SavedPass | None = None,
) -> dict[int, Ranking]:
    """For each s in `sizes`, the k entries with the largest scores over the first s ordered samples.

    One accumulation pass over the first max(sizes) samples, or none for a score that reads no samples. The mean over
    s and the sum order entries alike, so the sums are ranked as they stand. With several ranks this is collective,
    and all get the same.

    Args:
        scope: the largest of all, or of every parameter in proportion to its size (see `rank_entries`).
        layout, offload: of the sums, as in `accumulate_fisher`.
        traces: float64 [N], filled with each visited sample's trace where given.
        weights: float64 [N], by which the samples' losses are multiplied; not with `traces`.
        saved: keeps the state of the pass, and the rankings that it has passed.
    """
    add = summed(score)
    if rank_and_world()[1] == 1:
        layout = "replicated"
    if add is None:
        if traces is not None:
            samples.add_traces(order[: max(sizes)], traces, progress=progress)
        return dict.fromkeys(sizes, _ranking(samples, score, {}, layout, k, scope))
    sums = new_sums(samples, order, layout=layout, dtype=dtype, add=add, offload=offload)
    rankings: dict[int, Ranking] = {}

    def snapshot(size: int) -> None:
        ranking = _ranking(samples, score, sums.tensors, layout, k, scope)
        rankings[size] = ranking
        if saved is not None:
            saved.keep(f"ranking-{size}", {"parameter": ranking.parameter, "index": ranking.index})

    samples.accumulate(
        order[: max(sizes)],
        sums,
        traces,
        weights=weights,
        boundaries=sizes,
        at_boundary=snapshot,
        progress=progress,
        description="Masks",
        saved=saved,
    )
    for size in sizes:
        if size not in rankings:
            assert saved is not None, "only a pass that goes on leaves a boundary out"
            kept = saved.kept(f"ranking-{size}")
            rankings[size] = Ranking(kept["parameter"], kept["index"], samples.shapes)
    return rankings


def equal_weights(traces: Tensor) -> Tensor:
    """What to multiply samples' losses by for squared gradients that sum to 1 each: [N]; 0 for a trace of 0."""
    return torch.where(traces > 0, traces.rsqrt(), 0.0)


def _ranking(
    samples: SampleGradients, score: Score, sums: dict[str, Tensor], layout: Layout, k: int, scope: Scope
) -> Ranking:
    scores = entry_scores(score, samples.scored, sums, samples.seed, layout)
    shapes = samples.shapes if layout == "sharded" else None
    return rank_entries(Fisher(scores, torch.zeros(0, dtype=torch.float64), 0, layout, shapes), k, scope)
