"""Estimates of a run before any GPU is rented: memory, traffic, operations and time, from the model's config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from irdscale.cluster.share import share_of
from irdscale.config.schema import RunConfig, training_steps
from irdscale.errors import InputError
from irdscale.memory.gpu_sharing import AUTO_TRIALS
from irdscale.memory.phases import fisher_passes, main_memory, phases
from irdscale.memory.workload import Layout, Workload, workload_of
from irdscale.plan.advice import STAGES, advise, fits, peak, with_stage
from irdscale.plan.costs import Cost, Job, cost, job_of
from irdscale.plan.hardware import Gpu, find_gpu
from irdscale.utils.formats import GIB


def run_plan(
    config: RunConfig,
    nodes: int = 1,
    gpus_per_node: int = 1,
    gpu: str = "h100-80gb",
    *,
    tokens: int | None = None,
    train_samples: int | None = None,
) -> dict[str, Any]:
    """Estimate what a search, or a training, of a configuration takes on so many GPUs.

    Args:
        gpu: name in `irdscale.plan.hardware.GPUS`.
        tokens: length of the longest sample; `task.max_length` if None.
        train_samples: samples of the train split; needed if `train.steps` is not set.

    Returns:
        {"parameters", "k", "memory_gib": GiB per rank by item, in the phase with the least room, "traffic_gib": sent
        per rank, "flops": of all ranks, "hours", "fits", "advice"}; and their details: "phase", "phases" (items of
        every phase), "samples_per_second", "layouts" (every ZeRO stage and layout of the Fisher sums), "fisher_passes"
        (over the samples, for masks), "main_memory_gib" (per node, for offloaded tensors), "room_gib", "trials_a_gpu"
        (which share its memory and speed), "trial_room_gib", "gpu", "nodes", "gpus_per_node", "stage", "evaluations",
        "micro_batch", "tokens", "rates" ({"device": GPU that gave the rates behind "hours", "own": if it is this}).

    Raises:
        InputError: there is no such GPU or model, or the configuration does not fit the model or so many ranks.
    """
    for key, value in (("nodes", nodes), ("gpus_per_node", gpus_per_node)):
        if value < 1:
            raise InputError(f"found {value}", "at least 1", key=key)
    card = find_gpu(gpu, gpus_per_node)
    steps = _steps(config, train_samples)
    memory = None if card.name == "cpu" else int(card.memory)
    work, layout = workload_of(config, nodes, gpus_per_node, memory, tokens)
    job = _job(config, work, layout, card, steps)
    (phase, items), price = peak(job, layout), cost(job, layout)
    return {
        "parameters": job.shapes.parameters,
        "k": job.k,
        "memory_gib": items.gib(),
        **_costs(job, price),
        "fits": fits(job, layout),
        "advice": advise(job, layout),
        "phase": phase,
        "phases": {name: held.gib() for name, held in phases(job, layout).items()},
        "layouts": _layouts(job, layout),
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
        "micro_batch": job.micro_batch(layout),
        "tokens": job.tokens,
        "rates": {"device": job.gpu.rates.device, "own": job.gpu.measured},
    }


def _job(config: RunConfig, work: Workload, layout: Layout, card: Gpu, steps: int) -> Job:
    """The job; with `search.ray.gpus_per_rank: auto`, as many of its trials share a GPU as fit."""
    job = job_of(config, work, card, steps)
    if job.ray_ranks and card.name != "cpu" and config.search.ray.gpus_per_rank == "auto":
        most = min(AUTO_TRIALS, job.most_trials(phases(job, layout)))
        return replace(job, share=share_of(max(1, most)))
    return job


def _costs(job: Job, price: Cost) -> dict[str, Any]:
    hours = {name: _rounded(price.seconds[name] / 3600) for name in ("fisher", "candidate", "search")}
    return {
        "traffic_gib": {name: _rounded(sent / GIB) for name, sent in price.traffic.items()},
        "flops": {name: float(f"{flops:.6g}") for name, flops in price.flops.items()},
        "hours": {**hours, "train": hours["candidate"]},
        "samples_per_second": {
            "fisher": _rounded(job.samples / price.seconds["fisher"]),
            "train": _rounded(job.batch / price.seconds["step"]),
        },
    }


def _layouts(job: Job, layout: Layout) -> list[dict[str, Any]]:
    """Memory and hours under every ZeRO stage and layout of the Fisher sums; with one rank, of this layout alone."""
    found = []
    # ZeRO-3 cannot partition quantised weights.
    stages = [stage for stage in STAGES if stage != 3 or job.shapes.quantized is None]
    for stage in stages if layout.world > 1 else (layout.zero.stage,):
        for sharded in (False, True) if layout.world > 1 else (layout.sharded,):
            other = with_stage(replace(layout, sharded=sharded), stage)
            found.append(
                {
                    "stage": _named(stage),
                    "fisher": "sharded" if sharded else "replicated",
                    "configured": other == layout,
                    "memory_gib": {name: round(held.total / GIB, 2) for name, held in phases(job, other).items()},
                    "search_hours": _rounded(cost(job, other).seconds["search"] / 3600),
                    "fits": fits(job, other),
                }
            )
    return found


def _named(stage: int | None) -> str:
    return "ddp" if stage is None else f"zero{stage}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _steps(config: RunConfig, train_samples: int | None) -> int:
    """Optimizer steps of one training, without reading the data."""
    count = train_samples if train_samples is not None else config.task.limit.train
    if count is None and config.train.steps is None:
        expected = (
            "the size of the train split (train_samples=N), task.limit.train or train.steps: a plan reads no data"
        )
        raise InputError("missing", expected, key="train_samples")
    return training_steps(config.train, count or 0)
