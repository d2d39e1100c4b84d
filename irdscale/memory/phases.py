"""Bytes of a rank at the peak of each phase of a run."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod

from irdscale.memory.items import F32, begin_items, evaluate_items, fisher_items, pass_items, train_items
from irdscale.memory.sizes import Items, PassBytes, PassSetting
from irdscale.memory.workload import Layout, Workload
from irdscale.utils.groups import divided

# Phases in which trials may share a GPU. In the others, each rank has its own GPU.
TRIAL = ("begin", "train", "evaluate")


def phases(work: Workload, layout: Layout) -> dict[str, Items]:
    """Phase -> bytes of a rank at its peak, by item."""
    found = {"fisher": _masks(work, layout, fisher_passes(work, layout))}
    if work.traced:
        traces = _bytes_of(work, layout, "traces", _fisher_batch(work, layout))
        found["traces"] = pass_items(work.shapes, traces, layout.zero, layout.world)
    return found | trial_phases(work, layout)


def fisher_passes(work: Workload, layout: Layout) -> int:
    """Passes over the samples for masks: those of the layout, or the fewest whose sums fit.

    Sums in main memory are assumed to fit there.
    """
    most = len(work.shapes.scored)
    if layout.passes is not None:
        return min(layout.passes, most)
    room = work.fisher_room
    if room is None:
        return 1
    return next((n for n in range(1, most) if _masks(work, layout, n).total <= room), most)


def _masks(work: Workload, layout: Layout, passes: int) -> Items:
    """The pass for masks over the group of parameters with the most entries."""
    sizes, zero, world = work.shapes.scored, layout.zero, layout.world
    largest = max(divided(sizes, passes), key=lambda group: sum(prod(sizes[name]) for name in group))
    shapes = replace(work.shapes, scored={name: sizes[name] for name in largest})
    masks = _bytes_of(work, layout, "masks", _fisher_batch(work, layout))
    return fisher_items(shapes, masks, zero, world, work.item, layout.sharded, layout.offload)


def _fisher_batch(work: Workload, layout: Layout) -> int:
    # A rank may have fewer samples than a batch.
    return min(layout.fisher_batch, ceil(work.samples / layout.world))


def trial_phases(work: Workload, layout: Layout) -> dict[str, Items]:
    """`phases` of one training alone."""
    shapes, train, k = work.shapes, work.training_layout(layout), work.k
    step = _bytes_of(work, layout, "train", work.micro_batch(layout))
    evaluation = _bytes_of(work, layout, "evaluate", work.eval_batch)
    begin = begin_items(shapes, train.zero, train.world, k)
    return {
        **({"begin": begin} if begin.total else {}),
        "train": train_items(shapes, step, train.zero, train.world, k),
        "evaluate": evaluate_items(shapes, evaluation, train.zero, train.world, k),
    }


def _bytes_of(work: Workload, layout: Layout, kind: str, batch: int) -> PassBytes:
    setting = PassSetting(
        batch, work.tokens, work.ratio, layout.checkpointing, work.language, work.gpu_memory, work.scattered
    )
    return work.pass_bytes(kind, setting)


def main_memory(work: Workload, layout: Layout) -> int:
    """Bytes of a node's main memory for offloaded tensors."""
    shapes, zero, world = work.shapes, layout.zero, layout.world
    per_rank = 0
    if layout.offload:
        parts = world if layout.sharded else 1
        groups = [[prod(shapes.scored[name]) for name in group] for group in divided(shapes.scored, layout.passes or 1)]
        held = [-(-n // parts) for n in max(groups, key=sum)]
        # Two buffers of the largest parameter's sums are in transfer.
        per_rank += work.item * (sum(held) + 2 * max(held))
    if zero.offload_weights:
        per_rank += -(-shapes.parameters // world) * shapes.item
    if zero.offload_optimizer:
        per_rank += 4 * F32 * -(-(work.k + shapes.dense) // world)
    return per_rank * layout.gpus_per_node
