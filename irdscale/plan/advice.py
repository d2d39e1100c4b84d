"""Advice for a plan: changes with which a run fits its GPUs, or takes less time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from irdscale.cluster.share import share_of
from irdscale.memory.items import Zero, shipped
from irdscale.memory.phases import fisher_passes, main_memory, phases
from irdscale.memory.sizes import Items
from irdscale.memory.workload import Layout
from irdscale.plan.costs import Job, cost
from irdscale.utils.formats import counted, percent, size

STAGES = (None, 0, 1, 2, 3)
# Largest number of nodes that is tried.
MOST_NODES = 256


def peak(job: Job, layout: Layout) -> tuple[str, Items]:
    """The phase that uses the largest share of its available memory, and its items."""
    return max(phases(job, layout).items(), key=lambda item: item[1].total / max(1.0, job.room(item[0])))


def fits(job: Job, layout: Layout) -> bool:
    """Whether every phase fits in a rank's memory."""
    return all(items.total <= job.room(phase) for phase, items in phases(job, layout).items())


def with_stage(layout: Layout, stage: int | None) -> Layout:
    """The layout with another ZeRO stage, as configured in configs/deepspeed; unchanged if it has that stage."""
    return layout if layout.zero.stage == stage else replace(layout, zero=shipped(stage))


def cheapest(job: Job, layout: Layout, offload: bool = True) -> Layout | None:
    """The fastest layout that fits on the same GPUs, with this layout's batches if possible; None if none fits.

    Args:
        offload: whether main memory may be used if GPU memory is too small.
    """
    smaller = replace(layout, fisher_batch=1, accumulation=_accumulated(job, layout))
    for options in (_options(layout), _options(smaller), *([_offloading(smaller)] if offload else [])):
        # ZeRO-3 cannot partition quantised weights.
        possible = [option for option in options if job.shapes.quantized is None or option.zero.stage != 3]
        fitting = [option for option in possible if fits(job, option)]
        if fitting:
            return min(fitting, key=lambda option: cost(job, option).seconds["search"])
    return None


def _accumulated(job: Job, layout: Layout) -> int:
    """Accumulation steps with one sample per rank each."""
    return max(1, job.batch // (job.ray_ranks or layout.world))


def _options(layout: Layout) -> Iterator[Layout]:
    for stage in (None, 2, 3) if layout.world > 1 else (None,):
        for checkpointing in sorted({layout.checkpointing, True}):
            for sharded in (False, True) if layout.world > 1 else (False,):
                for own in {layout.zero, with_stage(layout, stage).zero}:
                    if own.stage == stage:
                        yield replace(layout, zero=own, checkpointing=checkpointing, sharded=sharded)


def _offloading(layout: Layout) -> Iterator[Layout]:
    for option in _options(layout):
        yield replace(option, offload=True, checkpointing=True)
        zero = Zero(3, overlap=True, offload_optimizer=True, offload_weights=True)
        yield replace(option, offload=True, checkpointing=True, zero=zero)


def fewest(job: Job, layout: Layout) -> Layout | None:
    """The fastest layout that fits on the fewest GPUs of the same kind; None if none fits."""
    # Weights and Fisher sums, which every layout without offloading needs; several passes need fewer sums at a time.
    least = job.shapes.base + (job.item * sum(job.shapes.scored_sizes) if layout.passes == 1 else 0)
    full = max(8, layout.gpus_per_node)
    inside = [2**i for i in range(full.bit_length()) if 2**i < full] + [full]
    counts = [(1, gpus) for gpus in inside] + [(2**i, full) for i in range(1, MOST_NODES.bit_length())]
    for nodes, gpus in counts:
        if job.ray_ranks is not None and nodes * gpus < job.ray_ranks:
            continue
        tried = replace(layout, nodes=nodes, gpus_per_node=gpus)
        if least > tried.world * job.gpu.room:
            continue
        if job.batch % (tried.world * tried.accumulation):
            tried = replace(tried, accumulation=_accumulated(job, tried))
        found = cheapest(job, tried, offload=False)
        if found is not None:
            return found
    return None


def changes(old: Layout, new: Layout) -> str:
    """The changes from one layout to another, as key=value of the configuration and of the plan."""
    changed = []
    if (new.nodes, new.gpus_per_node) != (old.nodes, old.gpus_per_node):
        changed.append(f"nodes={new.nodes} gpus_per_node={new.gpus_per_node}")
    if new.zero != old.zero:
        changed.append(f"train.deepspeed={_file(new.zero)}")
    for key, before, after in (
        ("fisher.layout", old.sharded, new.sharded),
        ("train.gradient_checkpointing", old.checkpointing, new.checkpointing),
        ("fisher.offload", old.offload, new.offload),
        ("fisher.batch_size", old.fisher_batch, new.fisher_batch),
        ("train.gradient_accumulation", old.accumulation, new.accumulation),
    ):
        if before != after:
            value = str(after).lower() if key != "fisher.layout" else "sharded" if after else "replicated"
            changed.append(f"{key}={value}")
    return " ".join(changed)


def _file(zero: Zero) -> str:
    if zero.stage is None:
        return "null"
    return f"configs/deepspeed/zero{zero.stage}{'_offload' if zero.offload_optimizer else ''}.json"


def advise(job: Job, layout: Layout) -> list[str]:
    """Lines of text: whether the layout fits, what fits instead, and what is faster."""
    phase, items = peak(job, layout)
    room = f"{size(job.room(phase))} of {job.gpu.name}"
    fitting = fits(job, layout)
    lines = [
        f"{'Fits' if fitting else 'Does not fit'}: the peak per rank is {size(items.total)}, "
        f"in {PHASES[phase]}; {room} can be used."
    ]
    passes, offloaded = fisher_passes(job, layout), main_memory(job, layout)
    if passes > 1:
        lines.append(f"Masks take {passes} passes over the samples (fisher.passes), each with the sums of some layers.")
    if offloaded:
        lines.append(f"Main memory per node: {size(offloaded)}, for offloaded tensors.")
    if job.share < 1:
        trials, room_for = job.trials_a_gpu, job.most_trials(phases(job, layout))
        share = f" ({share_of(room_for):g})" if room_for else ""
        lines.append(
            f"{counted(trials, 'trial')} may share a GPU (search.ray.gpus_per_rank={job.share:g}), at an assumed "
            f"1/{trials} of its speed each; it has room for {room_for}{share}."
        )
    here = cheapest(job, layout)
    if here is not None and here != layout:
        old, new = (cost(job, x).seconds["search"] for x in (layout, here))
        if not fitting:
            beside = main_memory(job, here)
            more = f", and {size(beside)} of main memory per node" if beside else ""
            lines.append(f"Fits here with {changes(layout, here)}: {size(peak(job, here)[1].total)}{more}.")
        elif new < 0.95 * old:
            lines.append(f"Faster here with {changes(layout, here)}: {percent(new / old, 2)} of the time.")
    least = fewest(job, layout)
    if least is None:
        most = f"{MOST_NODES} nodes"
        lines.append(f"Does not fit on up to {most}: lower search.ratio or task.max_length, or use larger GPUs.")
    elif not fitting or least.world < layout.world:
        taken = size(peak(job, least)[1].total)
        lines.append(f"Fewest GPUs on which it fits: {least.world}, with {changes(layout, least)}: {taken}.")
    if phase == "evaluate" and not fitting:
        lines.append("Evaluation has the largest peak: a smaller train.eval_batch_size lowers it.")
    return lines


PHASES = {
    "fisher": "the Fisher pass for masks",
    "traces": "the Fisher pass that ranks samples",
    "begin": "the start of training, which broadcasts the weights",
    "train": "a training step",
    "evaluate": "evaluation",
}
