"""Scores by which a mask's entries are chosen: the Fisher information and its alternatives.

fisher           sum of squared per-sample gradients (FISH, arXiv 2111.09839)
gradient         absolute value of the mean gradient
saliency         absolute value of weight times mean gradient (SNIP, arXiv 1810.02340)
gem              absolute value of mean gradient over weight (GEM, arXiv 2508.16191)
gallop           absolute value of the mean gradient, of small weights alone (GaLLoP, arXiv 2510.19778)
activation       |weight| times the norm of its input over all tokens (Wanda, arXiv 2306.11695)
mean_activation  |weight| times the mean of its |input| over all tokens (Super-Tuning, arXiv 2607.09287)
magnitude        absolute value of the weight; no samples are read
small_magnitude  |weight|, smallest first (Super-Tuning, arXiv 2607.09287); no samples are read
random           seeded random number; no samples are read
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from irdscale.config.schema import Score
from irdscale.distributed.ranks import slice_of
from irdscale.distributed.zero3 import gathered_parameters, shape_of
from irdscale.fisher.diagonal import Layout
from irdscale.fisher.squares import add_gradients, add_squares
from irdscale.fisher.sums import Add
from irdscale.fisher.terms import wide
from irdscale.utils.quantized import dequantized, is_quantized

# Scores of linear layers' weights alone, by the inputs that these multiply; no gradient is taken.
OF_INPUTS = ("activation", "mean_activation")
# Added to a weight's magnitude where the gradient is divided by it.
EPSILON = 1e-8


def reads_samples(score: Score) -> bool:
    """Whether the score depends on the samples."""
    return score not in ("magnitude", "small_magnitude", "random")


def summed(score: Score) -> Add | None:
    """The function that adds a batch to a parameter's sum; None for a score without gradients."""
    if score == "fisher":
        return add_squares
    return add_gradients if score in FACTORS else None


def over_weight(weights: Tensor) -> Tensor:
    """1 / (|w| + 1e-8), the factor of GEM's gradient-to-weight ratio (arXiv 2508.16191).

    A weight of 0 with a gradient comes before all others. The paper divides k among the layers by the entropy of their
    weights, which is left out here: `fisher.scope` divides k.
    """
    return (wide(weights).abs() + EPSILON).reciprocal()


def of_small_weight(weights: Tensor) -> Tensor:
    """1 where |w| is at most the mean |w| of its parameter, else 0: a reading of GaLLoP (arXiv 2510.19778).

    Its abstract asks for the largest gradients among the smallest weights. The mean is our bound between small and
    large weights, about 57 % of a normal distribution being below it.
    """
    magnitude = wide(weights).abs()
    return (magnitude <= magnitude.mean(dtype=torch.float64)).to(magnitude.dtype)


# Scores |mean gradient x factor| -> the factor, from a parameter's full weights.
FACTORS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "gradient": None,
    "saliency": lambda weights: weights,
    "gem": over_weight,
    "gallop": of_small_weight,
}


def entry_scores(
    score: Score, scored: dict[str, nn.Parameter], sums: dict[str, Tensor], seed: int, layout: Layout = "replicated"
) -> dict[str, Tensor]:
    """The non-negative score of every entry; in slices, as the sums, if the layout is `sharded`.

    Args:
        sums: name -> the parameter's sum, or this rank's slice of it; for a score of inputs, their sizes by
            `irdscale.fisher.activations.input_sizes`
    """
    if score == "small_magnitude":
        magnitudes = entry_scores("magnitude", scored, sums, seed, layout)
        return {name: _in_opposite_order(found) for name, found in magnitudes.items()}
    if score == "fisher":
        return sums
    if score in FACTORS:
        factor = FACTORS[score]
        if factor is None:
            return {name: total.abs() for name, total in sums.items()}
        return {
            name: (_part_of(scored[name], layout, factor).to(total.device, total.dtype) * total).abs()
            for name, total in sums.items()
        }
    if score in OF_INPUTS:
        return {name: _part_of(scored[name], layout, _times(size)) for name, size in sums.items()}
    if score == "magnitude":
        return {name: _part_of(parameter, layout).abs() for name, parameter in scored.items()}
    return {name: _held(_drawn(name, shape_of(p), seed), layout) for name, p in scored.items()}


def _times(size: Tensor) -> Callable[[Tensor], Tensor]:
    """|w| times the size of its input, on the device of the sizes."""
    return lambda weights: weights.to(size.device, size.dtype).abs() * size


def _part_of(
    parameter: nn.Parameter, layout: Layout, of: Callable[[Tensor], Tensor] = lambda weights: weights
) -> Tensor:
    """This rank's part of a function of a parameter's full weights, which keeps their shape."""
    with gathered_parameters([parameter]):
        weights = dequantized(parameter) if is_quantized(parameter) else parameter.detach()
        found = of(weights)
        held = _held(found, layout)
        # Gathered weights are released at the end of this block, and a slice would keep a whole new matrix alive.
        made = found is not weights or is_quantized(parameter)
        own = layout == "sharded" if made else hasattr(parameter, "ds_tensor")
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
