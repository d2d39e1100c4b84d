"""Floating-point operations and traffic of a run. Plain arithmetic.

A product of [T, I] with [I, O] is 2 T I O operations. Traffic is bytes sent per rank by ring algorithms: for S bytes,
S (w - 1) / w in an all-gather or a reduce-scatter, twice that in an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

from irdscale.memory.items import F32, Zero
from irdscale.memory.sizes import Shapes

# Attention kernels form [T, T] products twice in the forward pass and five times in the backward pass.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class SampleFlops:
    """Operations per sample of T tokens.

    Attributes:
        forward, backward: operations of the forward pass and of the input gradients.
        weights: operations of the weight gradients of all scored matrices.
        traces: operations of the Fisher traces, in float32 whatever the model's dtype.
    """

    forward: float
    backward: float
    weights: float
    traces: float


def sample_flops(shapes: Shapes, tokens: int) -> SampleFlops:
    """Operations per sample of so many tokens."""
    products = 2.0 * tokens * sum(out * inside for out, inside in shapes.products)
    attention = 4.0 * shapes.layers * shapes.attention * tokens**2 * (0.5 if shapes.causal else 1.0)
    multiplied = set(shapes.products)
    matrices = [(s[0], s[1]) for s in shapes.scored.values() if len(s) == 2 and (s[0], s[1]) in multiplied]
    weights = sum(2.0 * tokens * rows * columns for rows, columns in matrices)
    # As the rules of Fisher traces choose: one triangle of the tokens' Gram matrices, or the product.
    traces = sum(
        float(tokens**2 * (rows + columns))
        if tokens * (rows + columns) < rows * columns
        else 2.0 * tokens * rows * columns
        for rows, columns in matrices
    )
    return SampleFlops(products + attention, products + ATTENTION_BACKWARD * attention, weights, traces)


def all_gather(size: float, world: int) -> float:
    """Bytes sent per rank in an all-gather or a reduce-scatter of `size` bytes."""
    return size * (world - 1) / world


def all_reduce(size: float, world: int) -> float:
    """Bytes sent per rank in an all-reduce of `size` bytes."""
    return 2 * all_gather(size, world)


def gradient_traffic(trained: int, zero: Zero, world: int) -> float:
    """Bytes per step for gradients and updated values of so many trained parameters."""
    if zero.stage in (None, 0):
        return all_reduce(F32 * trained, world)
    # Gradients are reduce-scattered and values all-gathered, under ZeRO-3 twice.
    return all_gather(F32 * trained, world) * (2 if zero.stage in (1, 2) else 3)


def weight_traffic(shapes: Shapes, zero: Zero, world: int) -> float:
    """Bytes per batch to gather weights in the forward pass, and in the backward pass those not kept since."""
    if not zero.partitioned:
        return 0.0
    again = max(0, shapes.parameters - zero.live)
    return all_gather(float(shapes.item * (shapes.parameters + again)), world)


def sums_traffic(shapes: Shapes, sharded: bool, item: int, world: int, batches: int, boundaries: int) -> float:
    """Bytes per Fisher pass for the sums of squares.

    Args:
        batches: batches per rank.
        boundaries: number of sample sets; replicated sums are all-reduced at the end of each.
    """
    size = float(item * sum(shapes.scored_sizes))
    return batches * all_gather(size, world) if sharded else boundaries * all_reduce(size, world)
