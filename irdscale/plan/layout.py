"""One way to run a configuration on some GPUs, and what it takes: memory by phase, traffic, operations and time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil, prod

from irdscale.cluster.share import counted, jobs_a_gpu, share_of, shared_turns
from irdscale.config.schema import RunConfig
from irdscale.masks.parts import divided
from irdscale.plan.hardware import Gpu
from irdscale.plan.memory import F32, Zero, begin_items, evaluate_items, fisher_items, pass_items, train_items
from irdscale.plan.rates import columns_held
from irdscale.plan.sizes import Items, Setting, Shapes, Traced
from irdscale.plan.work import gradient_traffic, sample_flops, sums_traffic, weight_traffic
from irdscale.search.ird import Pair
from irdscale.search.limits import most_evaluations, reachable_sizes

# Phases of a trial; in the others a rank has its GPU alone.
TRIAL = ("begin", "train", "evaluate")
MOST_TRIALS = 64
# Kind of pass and setting -> bytes of one batch.
Trace = Callable[[str, Setting], Traced]


@dataclass(frozen=True)
class Layout:
    """How a run is laid out.

    Attributes:
        zero: DeepSpeed's settings.
        sharded, offload: of the Fisher sums.
        checkpointing: layers run again in the backward pass.
        fisher_batch: samples a batch of a Fisher pass, at most.
        accumulation: passes of a step, whose gradients are added up.
        nodes, gpus_per_node: one rank a GPU.
        passes: over the samples for masks, each with the sums of some parameters; as few as fit if None.
    """

    zero: Zero
    sharded: bool
    offload: bool
    checkpointing: bool
    fisher_batch: int
    accumulation: int
    nodes: int
    gpus_per_node: int
    passes: int | None = 1

    @property
    def world(self) -> int:
        """Ranks."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Job:
    """What a configuration asks for, whatever it runs on.

    Attributes:
        k: entries of the largest mask.
        tokens: of the longest sample.
        samples, batch: of the Fisher passes, and of a training step.
        steps, eval_batch: of a training, and samples of a batch whose metric is measured.
        head_steps: of a new head alone before the passes of a search, which take less memory than training.
        sizes: numbers of samples for which masks are made.
        evaluations: trainings of a whole search, at most.
        traced: whether the masks of the search come after a pass for the samples' traces.
        item: bytes of an entry of the sums.
        language: whether samples are texts that a language model goes on with.
        scattered: whether the entries of masks lie in all rows and columns, as those do that each matrix has alike.
        ray_ranks: ranks that train a candidate, where Ray runs candidates side by side.
        share: of a GPU that such a rank has; trials share the rest.
        trace: bytes of a pass.
    """

    shapes: Shapes
    gpu: Gpu
    k: int
    tokens: int
    samples: int
    batch: int
    steps: int
    eval_batch: int
    head_steps: int
    sizes: int
    evaluations: int
    traced: bool
    item: int
    language: bool
    scattered: bool
    ray_ranks: int | None
    share: float
    trace: Trace = field(repr=False)

    @property
    def trials_a_gpu(self) -> int:
        """Candidates that train on one GPU at the same time."""
        return jobs_a_gpu(self.share)

    def room(self, phase: str) -> float:
        """Bytes that tensors of a rank may take in a phase."""
        return self.gpu.room_of(self.share if phase in TRIAL else 1)

    def most_trials(self, found: dict[str, Items]) -> int:
        """How many trials of these phases a GPU has room for at the same time; 0 if not for one."""
        held = max(found[phase].total for phase in TRIAL if phase in found)
        most = 0
        while most < MOST_TRIALS and held <= self.gpu.room_of(share_of(most + 1)):
            most += 1
        return most


def job_of(
    config: RunConfig,
    shapes: Shapes,
    gpu: Gpu,
    start: Pair,
    minimum: Pair,
    tokens: int,
    steps: int,
    language: bool,
    trace: Trace,
) -> Job:
    """The job of a configuration.

    Args:
        start, minimum: the pair that the search starts from, and the one below which no candidate goes.
    """
    search = config.search
    return Job(
        shapes=shapes,
        gpu=gpu,
        k=start.params,
        tokens=tokens,
        samples=start.samples,
        batch=config.train.batch_size,
        steps=steps,
        eval_batch=config.train.eval_batch_size,
        # Before the pool's passes, and before those of the random samples.
        head_steps=2 * config.fisher.head_warmup,
        sizes=len(reachable_sizes(start, minimum)[0]),
        evaluations=most_evaluations(start, minimum, search.max_rounds, len(search.seeds)),
        traced=config.traced,
        item=8 if config.fisher.dtype == "float64" else 4,
        language=language,
        scattered=config.scope == "layerwise",
        ray_ranks=search.ray.ranks if search.runner == "ray" else None,
        share=_share(config, gpu),
        trace=trace,
    )


def _share(config: RunConfig, gpu: Gpu) -> float:
    shared = config.search.runner == "ray" and config.search.ray.shares_gpus and gpu.name != "cpu"
    return counted(config.search.ray.gpus_per_rank or 1) if shared else 1


def micro_batch(job: Job, layout: Layout) -> int:
    """Samples of one forward pass of a rank in training."""
    return max(1, job.batch // (_training(job, layout).world * layout.accumulation))


def _training(job: Job, layout: Layout) -> Layout:
    """The layout of one candidate's training: of Ray's ranks where they train side by side."""
    if job.ray_ranks is None:
        return layout
    return replace(
        layout, nodes=ceil(job.ray_ranks / layout.gpus_per_node), gpus_per_node=min(job.ray_ranks, layout.gpus_per_node)
    )


def phases(job: Job, layout: Layout) -> dict[str, Items]:
    """What a rank holds at the peak of each phase."""
    shapes, train = job.shapes, _training(job, layout)

    def traced(kind: str, batch: int) -> Traced:
        return _traced(job, layout, kind, batch)

    # Ranks share the samples, of which one may have fewer than a batch.
    batch = min(layout.fisher_batch, ceil(job.samples / layout.world))
    zero = layout.zero
    found = {"fisher": _masks(job, layout, traced("masks", batch), fisher_passes(job, layout))}
    if job.traced:
        found["traces"] = pass_items(shapes, traced("traces", batch), zero, layout.world)
    begin = begin_items(shapes, train.zero, train.world, job.k)
    if begin.total:
        found["begin"] = begin
    found["train"] = train_items(shapes, traced("train", micro_batch(job, layout)), train.zero, train.world, job.k)
    found["evaluate"] = evaluate_items(shapes, traced("evaluate", job.eval_batch), train.zero, train.world, job.k)
    return found


def fisher_passes(job: Job, layout: Layout) -> int:
    """Passes over the samples for masks: as configured, or as few as the GPU has room for.

    Sums in main memory are taken to fit there: how much a node has is not known.
    """
    most = len(job.shapes.scored)
    if layout.passes is not None:
        return min(layout.passes, most)
    batch = min(layout.fisher_batch, ceil(job.samples / layout.world))
    traced = _traced(job, layout, "masks", batch)
    fitting = (n for n in range(1, most) if _masks(job, layout, traced, n).total <= job.room("fisher"))
    return next(fitting, most)


def _masks(job: Job, layout: Layout, traced: Traced, passes: int) -> Items:
    """The pass that makes masks, of the group of parameters with the most entries."""
    held = job.shapes.scored
    groups = [{name: held[name] for name in group} for group in divided(held, passes)]
    largest = max(groups, key=lambda group: sum(prod(shape) for shape in group.values()))
    shapes = replace(job.shapes, scored=largest)
    return fisher_items(shapes, traced, layout.zero, layout.world, job.item, layout.sharded, layout.offload)


def _traced(job: Job, layout: Layout, kind: str, batch: int) -> Traced:
    memory = None if job.gpu.name == "cpu" else int(job.gpu.memory)
    setting = Setting(
        batch, job.tokens, _ratio(job), layout.checkpointing, job.language, memory, scattered=job.scattered
    )
    return job.trace(kind, setting)


def _ratio(job: Job) -> float:
    """The mask's share of the entries that it may hold."""
    return job.k / max(1, sum(job.shapes.scored_sizes))


def main_memory(job: Job, layout: Layout) -> int:
    """Bytes of a node's main memory for what is offloaded."""
    shapes, zero, world = job.shapes, layout.zero, layout.world
    a_rank = 0
    if layout.offload:
        parts = world if layout.sharded else 1
        groups = [[prod(shapes.scored[name]) for name in group] for group in divided(shapes.scored, layout.passes or 1)]
        held = [-(-n // parts) for n in max(groups, key=sum)]
        # The largest is on its way twice.
        a_rank += job.item * (sum(held) + 2 * max(held))
    if zero.offload_weights:
        a_rank += -(-shapes.parameters // world) * shapes.item
    if zero.offload_optimizer:
        a_rank += 4 * F32 * -(-(job.k + shapes.dense) // world)
    return a_rank * layout.gpus_per_node


@dataclass(frozen=True)
class Cost:
    """What a layout sends (bytes a rank), computes (operations of all ranks) and takes (seconds).

    Attributes:
        traffic: by collective, of a step or a pass, and `search` of all.
        flops, seconds: of the Fisher passes, a step, a candidate, and the whole search.
    """

    traffic: dict[str, float]
    flops: dict[str, float]
    seconds: dict[str, float]


def cost(job: Job, layout: Layout) -> Cost:
    """Traffic, operations and time; nothing is taken to be sent while something is computed."""
    shapes, train, gpu = job.shapes, _training(job, layout), job.gpu
    one = sample_flops(shapes, job.tokens)
    again = one.forward if layout.checkpointing else 0.0
    limit, small = one.forward + one.backward, columns_held(_ratio(job), job.scattered) * one.weights
    passed = limit + again
    # The passes that rank samples, make masks, and make the mask of as many random samples to compare with.
    ranking = job.traced * job.samples * (passed + one.traces)
    groups = fisher_passes(job, layout)
    masks = job.samples * (groups * passed + one.weights)
    step = job.batch * (passed + small)
    flops = {"fisher": ranking + masks, "step": step, "candidate": job.steps * step}
    all_steps = job.head_steps + job.evaluations * job.steps
    flops["search"] = ranking + masks + masks + all_steps * step

    batches = ceil(job.samples / layout.world / layout.fisher_batch)
    gathered = batches * weight_traffic(shapes, layout.zero, layout.world)
    sums = sums_traffic(shapes, layout.sharded, job.item, layout.world, batches, job.sizes)
    passes = job.traced + groups
    micro = layout.accumulation * weight_traffic(shapes, train.zero, train.world)
    gradients = gradient_traffic(job.k + shapes.dense, train.zero, train.world)
    traffic = {
        "gradients_a_step": gradients,
        "weights_a_step": micro,
        "sums_a_pass": sums,
        "weights_a_pass": gathered,
        "fisher": sums + passes * gathered,
        "candidate": job.steps * (gradients + micro),
    }
    beside = job.trials_a_gpu
    at_once = max(1, layout.world // train.world) * beside
    rounds = ceil(job.evaluations / at_once)
    # Who compute all the time share a GPU's speed: a round takes as long as all trials of one GPU one after another.
    turns = shared_turns(job.evaluations, at_once, beside)
    # Steps one after another; a head's is taken for a whole one, which takes more.
    steps = job.head_steps + rounds * job.steps
    traffic["search"] = traffic["fisher"] + sums + groups * gathered + steps * (gradients + micro)

    item, speed = shapes.item, gpu.pass_flops(shapes.item)
    band, own = gpu.bandwidth(layout.nodes), gpu.bandwidth(train.nodes)
    squaring, tracing_one = one.weights / gpu.square_flops(item), one.traces / gpu.gradient_flops(4)
    passing = job.samples * (groups * passed / speed + squaring) / layout.world + (sums + groups * gathered) / band
    tracing = job.samples * (passed / speed + tracing_one) / layout.world + gathered / band
    # Over the limit is what was measured without layers that are run again.
    over = gpu.step_over_limit("scattered" if job.scattered else "concentrated")
    fisher = passing + job.traced * tracing
    stepping = job.batch * (over * limit + again) / speed / train.world + (gradients + micro) / own
    seconds = {"fisher": fisher, "step": beside * stepping, "candidate": beside * job.steps * stepping}
    steps = job.head_steps + turns * job.steps
    seconds["search"] = fisher + passing + steps * stepping
    return Cost(traffic, flops, seconds)
