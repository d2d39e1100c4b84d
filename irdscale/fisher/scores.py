"""Scores by which a mask's entries are chosen: the Fisher information and its alternatives.

fisher      sum of squared per-sample gradients (FISH, arXiv 2111.09839)
gradient    absolute value of the mean gradient
saliency    absolute value of weight times mean gradient (SNIP, arXiv 1810.02340)
magnitude   absolute value of the weight; no samples are read
small_magnitude  |weight|, smallest first (Super-Tuning, arXiv 2607.09287); no samples are read
random      seeded random number; no samples are read
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from irdscale.config.schema import Score
from irdscale.distributed.ranks import slice_of
from irdscale.distributed.zero3 import gathered_parameters, shape_of
from irdscale.fisher.diagonal import Layout
from irdscale.fisher.squares import add_gradients, add_squares
from irdscale.fisher.sums import Add
from irdscale.utils.quantized import dequantized, is_quantized


def summed(score: Score) -> Add | None:
    """The function that adds a batch to a parameter's sum; None for a score that reads no samples."""
    if score == "fisher":
        return add_squares
    return add_gradients if score in ("gradient", "saliency") else None


def entry_scores(
    score: Score, scored: dict[str, nn.Parameter], sums: dict[str, Tensor], seed: int, layout: Layout = "replicated"
) -> dict[str, Tensor]:
    """The non-negative score of every entry; in slices, as the sums, if the layout is `sharded`.

    Args:
        sums: name -> the parameter's sum, or this rank's slice of it
    """
    if score == "small_magnitude":
        magnitudes = entry_scores("magnitude", scored, sums, seed, layout)
        return {name: _in_opposite_order(found) for name, found in magnitudes.items()}
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
    """This rank's part of a parameter's weights."""
    with gathered_parameters([parameter]):
        held = _held(dequantized(parameter) if is_quantized(parameter) else parameter.detach(), layout)
        # Gathered weights are released at the end of this block, and a slice would keep a dequantised matrix alive.
        own = hasattr(parameter, "ds_tensor") or (is_quantized(parameter) and layout == "sharded")
        return held.clone() if own else held


def _in_opposite_order(scores: Tensor) -> Tensor:
    """Non-negative numbers in the opposite order of `scores`, exactly: their bits subtracted from the largest."""
    found = scores if scores.dtype == torch.float64 else scores.float()
    integers = torch.int64 if found.dtype == torch.float64 else torch.int32
    largest = torch.full((), torch.finfo(found.dtype).max, dtype=found.dtype, device=found.device)
    return (largest.view(integers) - found.view(integers)).view(found.dtype)


def _held(tensor: Tensor, layout: Layout) -> Tensor:
    if layout == "replicated":
        return tensor
    start, stop = slice_of(tensor.numel())
    return tensor.reshape(-1)[start:stop]


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{name}").getrandbits(32))
    return torch.rand(shape, generator=generator, dtype=torch.float64)
