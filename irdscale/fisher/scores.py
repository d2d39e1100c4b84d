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

from irdscale.config.schema import Score
from irdscale.distributed.ranks import slice_of
from irdscale.distributed.zero3 import gathered_parameters, shape_of
from irdscale.fisher.diagonal import Layout
from irdscale.fisher.rules import add_gradients, add_squares
from irdscale.fisher.sums import Add
from irdscale.utils.quantized import dequantized, is_quantized


def summed(score: Score) -> Add | None:
    """What to add to a parameter's sum for a batch; None for a score that reads no samples."""
    if score == "fisher":
        return add_squares
    return add_gradients if score in ("gradient", "saliency") else None


def entry_scores(
    score: Score, scored: dict[str, nn.Parameter], sums: dict[str, Tensor], seed: int, layout: Layout = "replicated"
) -> dict[str, Tensor]:
    """The score of every entry, of at least 0, from what was summed.

    Args:
        sums: name -> the parameter's sum, or with layout `sharded` this rank's slice of it, as the scores are then.
    """
    if score == "fisher":
        return sums
    if score == "gradient":
        return {name: total.abs() for name, total in sums.items()}
    if score == "saliency":
        return {
            name: (_weights(scored[name], layout).to(total.device, total.dtype) * total).abs()
            for name, total in sums.items()
        }
    if score == "magnitude":
        return {name: _weights(parameter, layout).abs() for name, parameter in scored.items()}
    return {name: _held(_drawn(name, shape_of(p), seed), layout) for name, p in scored.items()}


def _weights(parameter: nn.Parameter, layout: Layout) -> Tensor:
    """What this rank scores of a parameter."""
    with gathered_parameters([parameter]):
        held = _held(dequantized(parameter) if is_quantized(parameter) else parameter.detach(), layout)
        # A partitioned parameter is gone after this, and a slice would hold the whole of a dequantised matrix.
        own = hasattr(parameter, "ds_tensor") or (is_quantized(parameter) and layout == "sharded")
        return held.clone() if own else held


def _held(tensor: Tensor, layout: Layout) -> Tensor:
    if layout == "replicated":
        return tensor
    start, stop = slice_of(tensor.numel())
    return tensor.reshape(-1)[start:stop]


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{name}").getrandbits(32))
    return torch.rand(shape, generator=generator, dtype=torch.float64)
