"""Bytes of a rank by item, in each phase of a run and under each ZeRO stage.

A trained parameter takes 16 bytes: a float32 value, its gradient and two moments. The allocations of torch's
DistributedDataParallel and DeepSpeed 0.18-0.19 are added: gradient buckets, the optimizer's copy of a partition's
values, and the weights that ZeRO-3 has gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from irdscale.distributed.deepspeed import gathering_options
from irdscale.memory.sizes import Items, PassBytes, Shapes

F32 = 4
# Bytes per mask entry: its index, and its position in the weight-gradient product.
INDEX = 8
# Bytes of a bucket in which DistributedDataParallel broadcasts weights at the start; two are in transfer.
BROADCAST = 250 * 2**20


@dataclass(frozen=True)
class Zero:
    """The settings of DeepSpeed that affect memory; defaults as in configs/deepspeed.

    Attributes:
        stage: ZeRO stage 0 to 3; None for torch's DistributedDataParallel.
        bucket: entries of a gradient bucket.
        overlap: whether one bucket is filled while another is sent.
        live: most entries that ZeRO-3 keeps gathered for reuse.
        prefetch: entries that ZeRO-3 gathers ahead.
        offload_optimizer, offload_weights: whether main memory holds them.
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
        """Whether a rank holds only its partition of the weights."""
        return self.stage == 3


def shipped(stage: int | None) -> Zero:
    """The settings of this stage's file in configs/deepspeed."""
    return Zero(stage, overlap=stage in (2, 3))


def zero_from(settings: dict[str, Any] | None, hidden: int) -> Zero:
    """The settings of a DeepSpeed file, with `auto` filled in as by the Trainer.

    Args:
        settings: result of `irdscale.distributed.deepspeed.zero_file`.
        hidden: width of the model's layers.
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
    """Bytes of the weights that a rank always holds, and of those that ZeRO-3 has gathered."""
    if not zero.partitioned:
        return shapes.base, 0
    own = -(-shapes.parameters // world) * shapes.item
    # Gathers in transfer have their own buffers: a layer, and the entries gathered ahead.
    arriving = min(zero.prefetch, shapes.parameters) + max(shapes.largest, shapes.layer)
    gathered = min(shapes.parameters, max(zero.live, shapes.largest)) + arriving
    return (0 if zero.offload_weights else own), gathered * shapes.item


def pass_items(shapes: Shapes, used: PassBytes, zero: Zero, world: int) -> Items:
    """A pass over samples without sums, for example for Fisher traces."""
    held, gathered = weights(shapes, zero, world)
    return Items(weights=held, activations=used.saved, buffers=used.peak - used.saved + gathered)


def fisher_items(
    shapes: Shapes, used: PassBytes, zero: Zero, world: int, item: int, sharded: bool, offload: bool = False
) -> Items:
    """A pass that sums the samples' squared gradients.

    Args:
        used: bytes of the pass over one batch, with unpartitioned weights.
        item: bytes per entry of the sums.
        sharded: whether a rank holds only its slice of each parameter's sums.
        offload: whether main memory holds the sums.
    """
    sizes, own = shapes.scored_sizes, pass_items(shapes, used, zero, world)
    sums, buffers = item * sum(sizes), item * max(sizes) if offload else 0
    if sharded and world > 1:
        sums = item * sum(-(-n // world) for n in sizes)
        # A batch's sums of one layer in transfer, and this rank's slice of them.
        buffers = item * -(-max(sizes) // world) * (world + 1)
    return replace(own, fisher=0 if offload else sums, buffers=own.buffers + buffers)


def train_items(shapes: Shapes, used: PassBytes, zero: Zero, world: int, k: int) -> Items:
    """A training step.

    Args:
        used: bytes of the pass over one micro-batch, with unpartitioned weights.
        k: mask entries.
    """
    held, gathered = weights(shapes, zero, world)
    trained = k + shapes.dense
    mask = k * (INDEX + shapes.item)
    return Items(
        weights=held,
        activations=used.saved,
        values_and_moments=values_and_moments(trained, zero, world),
        buffers=used.peak - used.saved + gathered + mask + gradient_buffers(trained, zero, world),
    )


def begin_items(shapes: Shapes, zero: Zero, world: int, k: int) -> Items:
    """The start of DistributedDataParallel, which broadcasts the weights in buckets; empty without it."""
    if zero.stage is not None or world == 1:
        return Items()
    trained, base = k + shapes.dense, shapes.base
    buffers = min(base, 2 * BROADCAST) + k * (INDEX + shapes.item) + F32 * trained
    return Items(weights=base, values_and_moments=F32 * trained, buffers=buffers)


def values_and_moments(trained: int, zero: Zero, world: int) -> int:
    """Bytes of a rank's trained parameters, their gradients and their moments."""
    part = -(-trained // world)
    if zero.stage in (None, 0):
        return 4 * F32 * trained
    if zero.stage == 3:
        # Values, the optimizer's copy of them, two moments, and two sets of gradients: as reduced and as used.
        return F32 * part if zero.offload_optimizer else 6 * F32 * part
    gradients = trained if zero.stage == 1 else part
    own = 0 if zero.offload_optimizer else 3 * part
    return F32 * (trained + gradients + own)


def gradient_buffers(trained: int, zero: Zero, world: int) -> int:
    """Bytes of the gradient buckets."""
    if zero.stage in (None, 0):
        return F32 * trained if world > 1 else 0
    return F32 * zero.bucket * (2 if zero.overlap and zero.stage < 3 else 1)


def evaluate_items(shapes: Shapes, used: PassBytes, zero: Zero, world: int, k: int) -> Items:
    """Predictions of a batch after training."""
    held, gathered = weights(shapes, zero, world)
    part = -(-k // world) if zero.partitioned else k
    return Items(held, used.peak, 0, F32 * part, gathered + k * (INDEX + shapes.item))
