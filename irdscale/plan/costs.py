"""Traffic, operations and time of a run on a kind of GPU, by layout."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from irdscale.cluster.share import counted, jobs_a_gpu, share_of, shared_turns
from irdscale.config.schema import RunConfig
from irdscale.memory.phases import TRIAL, fisher_passes
from irdscale.memory.sizes import Items, columns_held
from irdscale.memory.workload import Layout, Workload
from irdscale.plan.hardware import Gpu
from irdscale.plan.work import gradient_traffic, sample_flops, sums_traffic, weight_traffic
from irdscale.search.ird import Pair
from irdscale.search.limits import most_evaluations, reachable_sizes, smallest_pair

MOST_TRIALS = 64


@dataclass(frozen=True)
class Job(Workload):
    """A workload on a kind of GPU.

    Attributes:
        steps: optimizer steps of one training.
        head_steps: optimizer steps of head warm-up in the whole search.
        sizes: number of sample sets with masks.
        evaluations: most trainings of the whole search.
        share: share of a GPU per rank of a trial.
    """

    gpu: Gpu
    steps: int
    head_steps: int
    sizes: int
    evaluations: int
    share: float

    @property
    def trials_a_gpu(self) -> int:
        """Candidates that train on one GPU at the same time."""
        return jobs_a_gpu(self.share)

    def room(self, phase: str) -> float:
        """Bytes that a rank's tensors may take in a phase."""
        return self.gpu.room_of(self.share if phase in TRIAL else 1)

    def most_trials(self, found: dict[str, Items]) -> int:
        """Most trials with these phases that fit on one GPU at the same time; 0 if not even one."""
        held = max(found[phase].total for phase in TRIAL if phase in found)
        most = 0
        while most < MOST_TRIALS and held <= self.gpu.room_of(share_of(most + 1)):
            most += 1
        return most


def job_of(config: RunConfig, work: Workload, gpu: Gpu, steps: int) -> Job:
    """The job of a configuration with this workload.

    Args:
        steps: optimizer steps of one training.
    """
    search, start = config.search, Pair(work.samples, work.k)
    minimum = smallest_pair(config, start, work.shapes.parameters)
    given = search.ray.gpus_per_rank if search.runner == "ray" and gpu.name != "cpu" else None
    return Job(
        **(vars(work) | {"fisher_room": gpu.room}),
        gpu=gpu,
        steps=steps,
        # Before the pool's passes, and before those of the random samples.
        head_steps=2 * config.fisher.head_warmup,
        sizes=len(reachable_sizes(start, minimum)[0]),
        evaluations=most_evaluations(start, minimum, search.max_rounds, len(search.seeds)),
        share=counted(given) if isinstance(given, float) else 1,
    )


@dataclass(frozen=True)
class Cost:
    """What a layout sends (bytes per rank), computes (operations of all ranks) and takes (seconds).

    Attributes:
        traffic: bytes by collective, of a step, a pass, and the whole `search`.
        flops, seconds: of the Fisher passes, a step, a candidate, and the whole `search`.
    """

    traffic: dict[str, float]
    flops: dict[str, float]
    seconds: dict[str, float]


def cost(job: Job, layout: Layout) -> Cost:
    """Traffic, operations and time, without overlap of communication and computation."""
    shapes, train, gpu = job.shapes, job.training_layout(layout), job.gpu
    one = sample_flops(shapes, job.tokens)
    again = one.forward if layout.checkpointing else 0.0
    limit, small = one.forward + one.backward, columns_held(job.ratio, job.scattered) * one.weights
    passed = limit + again
    # Passes: ranking of samples, masks, and the mask of as many random samples for comparison.
    ranking = job.traced * job.samples * (passed + one.traces)
    passes = fisher_passes(job, layout)
    masks = job.samples * (passes * passed + one.weights)
    step = job.batch * (passed + small)
    flops = {"fisher": ranking + masks, "step": step, "candidate": job.steps * step}
    flops["search"] = ranking + masks + masks + (job.head_steps + job.evaluations * job.steps) * step

    batches = ceil(job.samples / layout.world / layout.fisher_batch)
    gathered = batches * weight_traffic(shapes, layout.zero, layout.world)
    sums = sums_traffic(shapes, layout.sharded, job.item, layout.world, batches, job.sizes)
    micro = layout.accumulation * weight_traffic(shapes, train.zero, train.world)
    gradients = gradient_traffic(job.k + shapes.dense, train.zero, train.world)
    traffic = {
        "gradients_a_step": gradients,
        "weights_a_step": micro,
        "sums_a_pass": sums,
        "weights_a_pass": gathered,
        "fisher": sums + (job.traced + passes) * gathered,
        "candidate": job.steps * (gradients + micro),
    }
    beside = job.trials_a_gpu
    at_once = max(1, layout.world // train.world) * beside
    # Consecutive steps. A step of head warm-up counts as a full step, which takes longer.
    steps = job.head_steps + ceil(job.evaluations / at_once) * job.steps
    traffic["search"] = traffic["fisher"] + sums + passes * gathered + steps * (gradients + micro)

    item, speed = shapes.item, gpu.pass_flops(shapes.item)
    band, own = gpu.bandwidth(layout.nodes), gpu.bandwidth(train.nodes)
    squaring, tracing_one = one.weights / gpu.square_flops(item), one.traces / gpu.gradient_flops(4)
    passing = job.samples * (passes * passed / speed + squaring) / layout.world + (sums + passes * gathered) / band
    tracing = job.samples * (passed / speed + tracing_one) / layout.world + gathered / band
    # The ratio to the limit was measured without gradient checkpointing.
    over = gpu.step_over_limit("scattered" if job.scattered else "concentrated")
    fisher = passing + job.traced * tracing
    stepping = job.batch * (over * limit + again) / speed / train.world + (gradients + micro) / own
    seconds = {"fisher": fisher, "step": beside * stepping, "candidate": beside * job.steps * stepping}
    # Trials on one GPU share its speed: a round takes as long as all of them one after another.
    turns = job.head_steps + shared_turns(job.evaluations, at_once, beside) * job.steps
    seconds["search"] = fisher + passing + turns * stepping
    return Cost(traffic, flops, seconds)
