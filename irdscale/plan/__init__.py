"""What a run will take before anything is rented for it: memory, traffic, operations and time, from the model's config.

Nothing is loaded but the model's config.json; the model is built on the meta device, where its tensors have shapes and
no bytes, and a few of its layers run there. All the rest is arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from irdscale.config.schema import LANGUAGE_KINDS, RunConfig, training_steps
from irdscale.distributed.deepspeed import micro_batch as checked_micro_batch
from irdscale.distributed.deepspeed import zero_file
from irdscale.errors import InputError
from irdscale.models.quantize import refuse_zero3
from irdscale.plan.hardware import find_gpu
from irdscale.plan.layout import TRIAL, Job, Layout, cost, fisher_passes, job_of, main_memory, micro_batch, phases
from irdscale.plan.memory import zero_from
from irdscale.plan.sizes import GIB
from irdscale.search.ird import Pair


def run_plan(
    config: RunConfig,
    nodes: int = 1,
    gpus_per_node: int = 1,
    gpu: str = "h100-80gb",
    *,
    tokens: int | None = None,
    train_samples: int | None = None,
) -> dict[str, Any]:
    """Plan a search, or a training, of a configuration on so many GPUs.

    Args:
        gpu: a name of `irdscale.plan.hardware.GPUS`.
        tokens: of the longest sample; `task.max_length` if None.
        train_samples: of the train split, where `train.steps` does not say how long a training is.

    Returns:
        {"parameters", "k", "memory_gib": GiB a rank by item at the peak of the phase that takes the most,
        "traffic_gib": what a rank sends, "flops": of all ranks, "hours", "fits", "advice"}, and what they rest on:
        "phase", "phases" (the items of every phase), "samples_per_second", "layouts" (each ZeRO stage and layout of
        the sums), "fisher_passes" (over the samples, for masks), "main_memory_gib" (a node's, for what is offloaded),
        "room_gib", "trials_a_gpu" (that share its memory and its speed), "trial_room_gib", "gpu", "nodes",
        "gpus_per_node", "stage", "evaluations", "micro_batch", "tokens", "rates" ({"device": whose measured shares of
        the peak the hours rest on, "own": whether that is this GPU}).

    Raises:
        InputError: no such GPU or model, or the configuration does not fit the model or so many ranks.
    """
    from irdscale.plan.advice import STAGES, advice, fits, peak, with_stage

    for key, value in (("nodes", nodes), ("gpus_per_node", gpus_per_node)):
        if value < 1:
            raise InputError(f"{key}: found {value}; expected at least 1")
    job, layout = _prepared(config, nodes, gpus_per_node, gpu, tokens, train_samples)
    found, (phase, items), price = phases(job, layout), peak(job, layout), cost(job, layout)
    layouts = []
    stages = [stage for stage in STAGES if stage != 3 or job.shapes.quantized is None]
    for stage in stages if layout.world > 1 else (layout.zero.stage,):
        for sharded in (False, True) if layout.world > 1 else (layout.sharded,):
            other = with_stage(replace(layout, sharded=sharded), stage)
            taken = phases(job, other)
            layouts.append(
                {
                    "stage": _named(stage),
                    "fisher": "sharded" if sharded else "replicated",
                    "configured": other == layout,
                    "memory_gib": {name: round(held.total / GIB, 2) for name, held in taken.items()},
                    "search_hours": _rounded(cost(job, other).seconds["search"] / 3600),
                    "fits": fits(job, other),
                }
            )
    return {
        "parameters": job.shapes.parameters,
        "k": job.k,
        "memory_gib": items.gib(),
        "traffic_gib": {name: _rounded(sent / GIB) for name, sent in price.traffic.items()},
        "flops": {name: float(f"{flops:.6g}") for name, flops in price.flops.items()},
        "hours": {
            "fisher": _rounded(price.seconds["fisher"] / 3600),
            "candidate": _rounded(price.seconds["candidate"] / 3600),
            "search": _rounded(price.seconds["search"] / 3600),
            "train": _rounded(price.seconds["candidate"] / 3600),
        },
        "fits": fits(job, layout),
        "advice": advice(job, layout),
        "phase": phase,
        "phases": {name: held.gib() for name, held in found.items()},
        "samples_per_second": {
            "fisher": _rounded(job.samples / price.seconds["fisher"]),
            "train": _rounded(job.batch / price.seconds["step"]),
        },
        "layouts": layouts,
        "fisher_passes": fisher_passes(job, layout),
        "main_memory_gib": round(main_memory(job, layout) / GIB, 2),
        "room_gib": round(job.gpu.room / GIB, 2),
        "trials_a_gpu": job.trials_a_gpu,
        "trial_room_gib": round(job.room("train") / GIB, 2),
        "gpu": job.gpu.name,
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "stage": _named(layout.zero.stage),
        "evaluations": job.evaluations,
        "micro_batch": micro_batch(job, layout),
        "tokens": job.tokens,
        "rates": {"device": job.gpu.rates.device, "own": job.gpu.measured},
    }


def trial_peak(config: RunConfig, tokens: int | None = None) -> tuple[str, int]:
    """The phase of a trial on a GPU that takes the most memory, and the bytes of a rank's tensors in it.

    Args:
        tokens: of the longest sample; `task.max_length` if None.

    Raises:
        InputError: as `run_plan`.
    """
    # The kind of GPU decides how fast a trial is, and the length of a training does not change what it takes.
    job, layout = _prepared(config, 1, config.search.ray.ranks, "h100-80gb", tokens, train_samples=1)
    found = {phase: items.total for phase, items in phases(job, layout).items() if phase in TRIAL}
    phase = max(found, key=lambda name: found[name])
    return phase, found[phase]


def _named(stage: int | None) -> str:
    return "ddp" if stage is None else f"zero{stage}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _prepared(
    config: RunConfig, nodes: int, gpus_per_node: int, gpu: str, tokens: int | None, train_samples: int | None
) -> tuple[Job, Layout]:
    card = find_gpu(gpu, gpus_per_node)
    world = config.search.ray.ranks if config.search.runner == "ray" else nodes * gpus_per_node
    if world > nodes * gpus_per_node:
        raise InputError(f"search.ray.ranks: found {world}; expected at most {nodes * gpus_per_node}, the GPUs")
    checked_micro_batch(config, world)
    settings = zero_file(config, world)
    refuse_zero3(config, None if settings is None else settings["zero_optimization"]["stage"])
    steps = _steps(config, train_samples)

    from irdscale.fisher.pool import mask_size
    from irdscale.plan.shapes import meta_model, scored_of, shapes_of, task_kind
    from irdscale.plan.trace import tracer
    from irdscale.search.masks import smallest_pair

    model = meta_model(config)
    shapes = shapes_of(config, model)
    start = Pair(config.fisher.samples, mask_size(config, model, sum(shapes.scored_sizes)))
    minimum = smallest_pair(config, start, shapes.parameters)
    longest = config.task.max_length if tokens is None else tokens
    if shapes.positions is not None and longest > shapes.positions:
        key = "task.max_length" if tokens is None else "tokens"
        raise InputError(f"{key}: found {longest}; expected at most {shapes.positions}, the model's positions")
    language = task_kind(config) in LANGUAGE_KINDS
    trace = tracer(model, scored_of(config, model))
    job = job_of(config, shapes, card, start, minimum, longest, steps, language, trace)
    layout = Layout(
        zero=zero_from(settings, shapes.hidden),
        sharded=config.fisher.layout == "sharded",
        offload=config.fisher.offload,
        checkpointing=config.train.gradient_checkpointing,
        fisher_batch=config.fisher.batch_size,
        accumulation=config.train.gradient_accumulation,
        passes=None if config.fisher.passes == "auto" else config.fisher.passes,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
    )
    return job, layout


def _steps(config: RunConfig, train_samples: int | None) -> int:
    """Steps of a training; no data set is read."""
    count = train_samples if train_samples is not None else config.task.limit.train
    if count is None and config.train.steps is None:
        raise InputError(
            "train_samples: missing; expected the size of the train split (train_samples=N), task.limit.train or "
            "train.steps, for a plan reads no data"
        )
    return training_steps(config.train, count or 0)
