"""Rankings of entries from the scores of one group of parameters after another, which are never in memory together.

Of each group only the entries that may be among the first k are kept, with their scores. The ranking is exactly that of
`irdscale.masks.mask.rank_entries`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from irdscale.config.schema import Scope
from irdscale.masks.mask import ROUNDING, Ranking, counts_within, largest_score, positions_of
from irdscale.masks.topk import Chosen, check_scores, largest, largest_of_checked

if TYPE_CHECKING:
    from irdscale.fisher.diagonal import Fisher

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Candidates:
    """Entries of one group that may be among the first k of all groups.

    Attributes:
        chosen: name -> entries of that parameter, sorted by flat index
        largest: largest score of the group
    """

    chosen: dict[str, Chosen]
    largest: float


def candidates_of(fisher: Fisher, k: int, scope: Scope, shapes: Shapes) -> Candidates:
    """The candidates of one group; collective if its scores are sharded.

    Args:
        fisher: scores of the group's parameters
        shapes: name -> shape of every scored parameter of all groups

    Raises:
        InputError: a score is NaN, infinite or negative (named).
    """
    shared, pieces = fisher.layout == "sharded", fisher.slices()
    check_scores(pieces, shared)
    top = largest_score(pieces, shared)
    if scope == "global":
        own = sum(torch.Size(shape).numel() for shape in fisher.shapes.values())
        return Candidates(largest(pieces, min(k, own), shared), top)
    counts = counts_within(k, shapes)
    chosen: dict[str, Chosen] = {}
    for name, piece in pieces.items():
        chosen |= largest_of_checked({name: piece}, counts[name] if k else 0, shared)
    return Candidates(chosen, top)


def ranking_of(groups: Sequence[Candidates], k: int, scope: Scope, shapes: Shapes) -> Ranking:
    """The first k entries of all groups in descending order, as `rank_entries` ranks all scores together."""
    found = {name: entries for group in groups for name, entries in group.chosen.items()}
    if scope == "layerwise":
        floor = ROUNDING * max((group.largest for group in groups), default=0.0)
        found = {name: _cleared(entries, floor) for name, entries in found.items()}
    keys, parameters, indices = [], [], []
    for place, (name, shape) in enumerate(shapes.items()):
        if name in found:
            entries, numel = found[name], torch.Size(shape).numel()
            keys.append(-positions_of(entries.scores, numel) if scope == "layerwise" else entries.scores)
            parameters.append(torch.full_like(entries.index, place))
            indices.append(entries.index)
    if not keys:
        none = torch.zeros(0, dtype=torch.int64)
        return Ranking(none, none, shapes)
    order = torch.cat(keys).sort(descending=True, stable=True).indices[:k]
    return Ranking(torch.cat(parameters)[order], torch.cat(indices)[order], shapes)


def _cleared(entries: Chosen, floor: float) -> Chosen:
    """As many entries of the parameter as given, with those below `floor` replaced by its first ones, of score 0."""
    kept = entries.scores >= floor
    index, scores, missing = entries.index[kept], entries.scores[kept], int((~kept).sum())
    if not missing:
        return entries
    first = torch.arange(len(entries.index))
    fill = first[~torch.isin(first, index)][:missing]
    index, order = torch.cat([index, fill]).sort()
    return Chosen(index, torch.cat([scores, scores.new_zeros(missing)])[order])
