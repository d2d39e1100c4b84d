"""What a run computes and sends: floating-point operations and bytes of collectives. Plain arithmetic.

A product of [T, I] with [I, O] is 2 T I O operations. Bytes are those that one rank sends, by the ring algorithms: of S
bytes (w - 1) / w of them in an all-gather or a reduce-scatter, twice that in an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

from irdscale.memory.items import F32, Zero
from irdscale.memory.sizes import Shapes

# An attention kernel forms its [T, T] products twice forward and five times backward.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class SampleFlops:
    """Operations for one sample of T tokens.

    Attributes:
        forward, backward: a pass through the model, and the gradients of inputs back through it.
        weights: the products for the gradients of all scored matrices.
        traces: those of the pass that takes traces, which are in float32 whatever the model's type.
    """

    forward: float
    backward: float
    weights: float
    traces: float


def sample_flops(shapes: Shapes, tokens: int) -> SampleFlops:
    """Operations for one sample of so many tokens."""
    products = 2.0 * tokens * sum(out * inside for out, inside in shapes.products)
    attention = 4.0 * shapes.layers * shapes.attention * tokens**2 * (0.5 if shapes.causal else 1.0)
    multiplied = set(shapes.products)
    matrices = [(s[0], s[1]) for s in shapes.scored.values() if len(s) == 2 and (s[0], s[1]) in multiplied]
    weights = sum(2.0 * tokens * rows * columns for rows, columns in matrices)
    # As irdscale.fisher.rules chooses: Gram matrices of tokens, of which one triangle is formed, or the product.
    traces = sum(
        float(tokens**2 * (rows + columns))
        if tokens * (rows + columns) < rows * columns
        else 2.0 * tokens * rows * columns
        for rows, columns in matrices
    )
    return SampleFlops(products + attention, products + ATTENTION_BACKWARD * attention, weights, traces)


def all_gather(size: float, world: int) -> float:
    """Bytes sent in an all-gather, or a reduce-scatter, of so many bytes in all."""
    return size * (world - 1) / world


def all_reduce(size: float, world: int) -> float:
    """Bytes sent in an all-reduce of so many bytes."""
    return 2 * all_gather(size, world)


def gradient_traffic(numbers: int, zero: Zero, world: int) -> float:
    """Bytes a step for the gradients of the trained numbers, and the values after it."""
    if zero.stage in (None, 0):
        return all_reduce(F32 * numbers, world)
    # Reduced to their owners; new values come back, under ZeRO-3 with the weights.
    return all_gather(F32 * numbers, world) * (2 if zero.stage in (1, 2) else 3)


def weight_traffic(shapes: Shapes, zero: Zero, world: int) -> float:
    """Bytes a batch for weights that are gathered, forward and backward; what is still there is not gathered again."""
    if not zero.partitioned:
        return 0.0
    again = max(0, shapes.parameters - zero.live)
    return all_gather(float(shapes.item * (shapes.parameters + again)), world)


def sums_traffic(shapes: Shapes, sharded: bool, item: int, world: int, batches: int, boundaries: int) -> float:
    """Bytes a pass for the sums of squares.

    Args:
        batches: of a rank.
        boundaries: sizes of sample sets, at each of which whole sums are added up over the ranks.
    """
    size = float(item * sum(shapes.scored_sizes))
    return batches * all_gather(size, world) if sharded else boundaries * all_reduce(size, world)
