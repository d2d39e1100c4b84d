"""What a rank holds in memory, by item, in each phase of a run and under each ZeRO stage. Plain arithmetic, in bytes.

Trained numbers are float32: a value, its gradient and two moments, 16 bytes each. What else is counted is what torch's
DistributedDataParallel and DeepSpeed 0.18-0.19 allocate: buckets for gradients, a partition's own copy of its values,
and the weights that ZeRO-3 has gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from irdscale.distributed.deepspeed import gathering_options
from irdscale.plan.sizes import Items, Shapes, Traced

F32 = 4
# A mask's index and the place of each entry in its product.
INDEX = 8
# Bytes of a bucket in which DistributedDataParallel sends weights as it starts; two are on their way.
BROADCAST = 250 * 2**20


@dataclass(frozen=True)
class Zero:
    """A DeepSpeed configuration, as far as memory goes; the defaults are those of configs/deepspeed.

    Attributes:
        stage: 0 to 3, or None for torch's own DistributedDataParallel.
        bucket: entries of a bucket of gradients.
        overlap: two buckets, one of which is filled while the other is sent.
        live: entries that ZeRO-3 keeps gathered at most, where they are used again soon.
        prefetch: entries that ZeRO-3 gathers ahead.
        offload_optimizer, offload_weights: kept in main memory.
    """

    stage: int | None = None
    bucket: int = 50_000_000
    overlap: bool = False
    live: int = 1_000_000_000
    prefetch: int = 50_000_000
    offload_optimizer: bool = False
    offload_weights: bool = False

    @property
    def partitioned(self) -> bool:
        """Whether a rank holds its part of the weights alone."""
        return self.stage == 3


def shipped(stage: int | None) -> Zero:
    """What the file of this stage in configs/deepspeed says."""
    return Zero(stage, overlap=stage in (2, 3))


def zero_from(settings: dict[str, Any] | None, hidden: int) -> Zero:
    """From the contents of a DeepSpeed file, `auto` filled in as the Trainer does.

    Args:
        settings: as `irdscale.distributed.deepspeed.zero_file` gives them.
        hidden: the model's width.
    """
    if settings is None:
        return Zero()
    zero = settings["zero_optimization"]
    stage = int(zero["stage"])

    def entries(key: str, auto: float, default: float) -> int:
        found = zero.get(key, default)
        return int(auto if found == "auto" else found)

    def in_main_memory(key: str) -> bool:
        section = zero.get(key)
        return (section.get("device") if isinstance(section, dict) else section) == "cpu"

    gathers = gathering_options(zero, hidden)
    return Zero(
        stage,
        bucket=entries("reduce_bucket_size", hidden * hidden, 5e8),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        live=min(gathers["max_live_parameters"], gathers["max_reuse_distance"]),
        prefetch=gathers["prefetch_bucket_size"],
        offload_optimizer=in_main_memory("offload_optimizer"),
        offload_weights=in_main_memory("offload_param"),
    )


def weights(shapes: Shapes, zero: Zero, world: int) -> tuple[int, int]:
    """Bytes of the weights that a rank holds, and of those that are whole only while they are used."""
    if not zero.partitioned:
        return shapes.base, 0
    own = -(-shapes.parameters // world) * shapes.item
    # What is gathered comes in buffers of their own, of a layer and of what is gathered ahead.
    arriving = min(zero.prefetch, shapes.parameters) + max(shapes.largest, shapes.layer)
    gathered = min(shapes.parameters, max(zero.live, shapes.largest)) + arriving
    return (0 if zero.offload_weights else own), gathered * shapes.item


def pass_items(shapes: Shapes, traced: Traced, zero: Zero, world: int) -> Items:
    """A pass over samples that adds nothing up, as the one that takes their traces."""
    held, gathered = weights(shapes, zero, world)
    return Items(weights=held, activations=traced.saved, buffers=traced.peak - traced.saved + gathered)


def fisher_items(
    shapes: Shapes, traced: Traced, zero: Zero, world: int, item: int, sharded: bool, offload: bool = False
) -> Items:
    """A pass over samples that adds up their squared gradients.

    Args:
        traced: the pass of one batch over whole weights.
        item: bytes of an entry of the sums.
        sharded: a rank holds its slice of each parameter's sums.
        offload: the sums are in main memory.
    """
    sizes, own = shapes.scored_sizes, pass_items(shapes, traced, zero, world)
    sums, buffers = item * sum(sizes), item * max(sizes) if offload else 0
    if sharded and world > 1:
        sums = item * sum(-(-n // world) for n in sizes)
        # A batch's sums of layers on their way, and this rank's slices of them.
        buffers = item * -(-max(sizes) // world) * (world + 1)
    return replace(own, fisher=0 if offload else sums, buffers=own.buffers + buffers)


def train_items(shapes: Shapes, traced: Traced, zero: Zero, world: int, k: int) -> Items:
    """A training step.

    Args:
        traced: a micro-batch's pass over whole weights.
        k: entries of the mask.
    """
    held, gathered = weights(shapes, zero, world)
    numbers = k + shapes.dense
    mask = k * (INDEX + shapes.item)
    return Items(
        weights=held,
        activations=traced.saved,
        values_and_moments=values_and_moments(numbers, zero, world),
        buffers=traced.peak - traced.saved + gathered + mask + gradient_buffers(numbers, zero, world),
    )


def begin_items(shapes: Shapes, zero: Zero, world: int, k: int) -> Items:
    """The moment in which DistributedDataParallel makes all ranks' weights equal, by buckets of copies; or nothing."""
    if zero.stage is not None or world == 1:
        return Items()
    numbers, base = k + shapes.dense, shapes.base
    buffers = min(base, 2 * BROADCAST) + k * (INDEX + shapes.item) + F32 * numbers
    return Items(weights=base, values_and_moments=F32 * numbers, buffers=buffers)


def values_and_moments(numbers: int, zero: Zero, world: int) -> int:
    """Bytes of the trained numbers, their gradients and their moments on a rank."""
    part = -(-numbers // world)
    if zero.stage in (None, 0):
        return 4 * F32 * numbers
    if zero.stage == 3:
        # The values, the optimizer's copy of them, two moments, and gradients as they come and as they are used.
        return F32 * part if zero.offload_optimizer else 6 * F32 * part
    gradients = numbers if zero.stage == 1 else part
    own = 0 if zero.offload_optimizer else 3 * part
    return F32 * (numbers + gradients + own)


def gradient_buffers(numbers: int, zero: Zero, world: int) -> int:
    """Bytes of the buckets in which gradients are sent."""
    if zero.stage in (None, 0):
        return F32 * numbers if world > 1 else 0
    return F32 * zero.bucket * (2 if zero.overlap and zero.stage < 3 else 1)


def evaluate_items(shapes: Shapes, traced: Traced, zero: Zero, world: int, k: int) -> Items:
    """Predictions of a batch, after training."""
    held, gathered = weights(shapes, zero, world)
    part = -(-k // world) if zero.partitioned else k
    return Items(held, traced.peak, 0, F32 * part, gathered + k * (INDEX + shapes.item))
