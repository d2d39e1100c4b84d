"""What makes an entry worth training: the Fisher information, or one of its rivals.

A score names what is summed over the samples, and how the sum becomes a number for each entry:

    fisher      sum of squared per-sample gradients (FISH, arXiv 2111.09839)
    gradient    size of the mean gradient
    saliency    size of weight times mean gradient (SNIP, arXiv 1810.02340)
    magnitude   size of the weight; no samples are read
    random      a seeded draw; no samples are read
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from irdscale.config import Score
from irdscale.fisher.accumulate import Add
from irdscale.fisher.rules import add_gradients, add_squares


def summed(score: Score) -> Add | None:
    """What to add to a parameter's sum for a batch; None for a score that reads no samples."""
    if score == "fisher":
        return add_squares
    return add_gradients if score in ("gradient", "saliency") else None


def entry_scores(
    score: Score, scored: dict[str, nn.Parameter], sums: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """The score of every entry, of at least 0, from what was summed."""
    if score == "fisher":
        return sums
    if score == "gradient":
        return {name: total.abs() for name, total in sums.items()}
    if score == "saliency":
        return {name: (scored[name].detach().to(total.dtype) * total).abs() for name, total in sums.items()}
    if score == "magnitude":
        return {name: parameter.detach().abs() for name, parameter in scored.items()}
    return {name: _drawn(name, parameter, seed) for name, parameter in scored.items()}


def _drawn(name: str, parameter: nn.Parameter, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{name}").getrandbits(32))
    return torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
