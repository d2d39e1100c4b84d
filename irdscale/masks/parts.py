"""A ranking of entries whose scores never stand beside each other: parameter groups come one after the other.

Of each group are kept the entries that may be among the k first, with their scores. The ranking of all is that of
`irdscale.masks.mask.rank_entries`, entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from irdscale.config.schema import Scope
from irdscale.distributed.ranks import gather_texts
from irdscale.masks.mask import ROUNDING, Ranking
from irdscale.masks.topk import Chosen, check_scores, largest, largest_of_checked, read

if TYPE_CHECKING:
    from irdscale.fisher.diagonal import Fisher

Shapes = dict[str, tuple[int, ...]]


def divided(shapes: Shapes, passes: int) -> list[list[str]]:
    """The names in at most so many runs of about as many entries."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    total, before, groups = sum(sizes.values()), 0, [list[str]() for _ in range(passes)]
    for name, size in sizes.items():
        groups[min(passes - 1, (2 * before + size) * passes // (2 * max(1, total)))].append(name)
        before += size
    return [group for group in groups if group]


@dataclass(frozen=True)
class Candidates:
    """Entries of one group that may be among the k first of all.

    Attributes:
        chosen: name -> entries of that parameter, sorted by flat index.
        largest: the largest score of the group.
    """

    chosen: dict[str, Chosen]
    largest: float


def candidates_of(fisher: Fisher, k: int, scope: Scope, shapes: Shapes) -> Candidates:
    """The candidates of one group; collective where its scores are sharded.

    Args:
        fisher: scores of the group's parameters.
        shapes: name -> shape of every scored parameter of all groups.

    Raises:
        InputError: a score is NaN, infinite or negative (named).
    """
    shared, pieces = fisher.layout == "sharded", fisher.slices()
    check_scores(pieces, shared)
    scores = [piece.scores.max() for piece in pieces.values() if piece.scores.numel()]
    top = max(read(scores, torch.float64).tolist(), default=0.0)
    if shared:
        top = max(map(float, gather_texts(repr(top))))
    if scope == "global":
        own = sum(torch.Size(shape).numel() for shape in fisher.shapes.values())
        return Candidates(largest(pieces, min(k, own), shared), top)
    chosen: dict[str, Chosen] = {}
    for name, piece in pieces.items():
        chosen |= largest_of_checked({name: piece}, _count(name, k, shapes), shared)
    return Candidates(chosen, top)


def ranking_of(groups: Sequence[Candidates], k: int, scope: Scope, shapes: Shapes) -> Ranking:
    """The k first entries of all groups in descending order, as `rank_entries` has them of all scores together."""
    found = {name: entries for group in groups for name, entries in group.chosen.items()}
    if scope == "layerwise":
        floor = ROUNDING * max((group.largest for group in groups), default=0.0)
        found = {name: _cleared(entries, floor) for name, entries in found.items()}
    keys, parameters, indices = [], [], []
    for place, (name, shape) in enumerate(shapes.items()):
        if name in found:
            entries = found[name]
            layerwise = scope == "layerwise"
            keys.append(-_standing(entries.scores, torch.Size(shape).numel()) if layerwise else entries.scores)
            parameters.append(torch.full_like(entries.index, place))
            indices.append(entries.index)
    if not keys:
        none = torch.zeros(0, dtype=torch.int64)
        return Ranking(none, none, shapes)
    order = torch.cat(keys).sort(descending=True, stable=True).indices[:k]
    return Ranking(torch.cat(parameters)[order], torch.cat(indices)[order], shapes)


def _count(name: str, k: int, shapes: Shapes) -> int:
    """Entries of a parameter that stand at or before the k-th of all by standing, at most."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    standing = (k + len(sizes)) / max(1, sum(sizes.values()))
    return min(sizes[name], int(sizes[name] * standing + 0.5)) if k else 0


def _cleared(entries: Chosen, floor: float) -> Chosen:
    """As many entries, those below `floor` replaced by the first ones of the parameter, with a score of 0."""
    kept = entries.scores >= floor
    index, scores, missing = entries.index[kept], entries.scores[kept], int((~kept).sum())
    if not missing:
        return entries
    first = torch.arange(len(entries.index))
    fill = first[~torch.isin(first, index)][:missing]
    index, order = torch.cat([index, fill]).sort()
    return Chosen(index, torch.cat([scores, scores.new_zeros(missing)])[order])


def _standing(scores: Tensor, numel: int) -> Tensor:
    """(2 r - 1) / 2n for the r-th largest of n scores, of which these are the largest."""
    order = scores.sort(descending=True, stable=True).indices
    standing = torch.empty(len(scores), dtype=torch.float64)
    standing[order] = (2 * torch.arange(len(scores), dtype=torch.float64) + 1) / (2 * numel)
    return standing
