"""Duration of a search on this machine, from a few measured steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch

from irdscale.cluster.share import shared_turns
from irdscale.config.schema import RunConfig, short_training, training_steps
from irdscale.distributed.deepspeed import micro_batch
from irdscale.distributed.process_group import in_process_group
from irdscale.fisher.nested import ranked_entries_by_prefix
from irdscale.fisher.passes import SampleGradients
from irdscale.fisher.pool import pass_options
from irdscale.masks.mask import Mask, Ranking
from irdscale.search.ird import Pair
from irdscale.search.limits import most_candidates, most_evaluations, most_rounds, reachable_sizes, smallest_pair
from irdscale.tasks import load_task
from irdscale.training.base_model import KeptBase, base_model, keeping
from irdscale.training.control import Control
from irdscale.training.evaluate import evaluate_model
from irdscale.training.mask_passes import MaskPass, mask_pass
from irdscale.training.trainable import make_sparse
from irdscale.training.trainer import fine_tune

if TYPE_CHECKING:
    from irdscale.tasks import Task

# Training steps in all, and the first of them, which are not measured.
STEPS, FIRST = 5, 2


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a search.

    Attributes:
        trace, gradient: seconds per sample in the pass that ranks samples, and in the pass for masks.
        ranking: seconds to rank all entries, once per sample set.
        begin: seconds until a candidate's first step, with a loaded model.
        step: seconds per training step.
        prediction: seconds per sample of an evaluation.
        load: seconds to load the model.
    """

    trace: float
    gradient: float
    ranking: float
    begin: float
    step: float
    prediction: float
    load: float = 0.0


@dataclass(frozen=True)
class Size:
    """Upper bounds of a search's work.

    Attributes:
        rounds, candidates: rounds, and candidates per round.
        evaluations: evaluations of the rounds and the baselines, over all seeds.
        steps: optimizer steps per evaluation.
        samples: samples of each Fisher pass.
        rankings: sample sets with masks.
        selection, test: samples of the splits.
    """

    rounds: int
    candidates: int
    evaluations: int
    steps: int
    samples: int
    rankings: int
    selection: int
    test: int


def measured(config: RunConfig, threads: int | None = None, ranks: int = 1, kept: bool = True) -> tuple[Costs, Size]:
    """Measure a few steps of a search on this machine; writes nothing.

    Args:
        threads: CPU threads; torch's default if None.
        ranks: ranks that share a training step, of which one rank's part is measured.
        kept: whether a process keeps its model between evaluations; otherwise `begin` includes a load.

    Raises:
        InputError: the configuration does not fit the data, the model or the ranks.
        TrainingError: training diverged (NaN or Inf).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        always = config.train.deepspeed is not None
        with in_process_group(config.distributed, always=always), keeping(KeptBase()) if kept else nullcontext():
            return _measured(config, ranks)
    finally:
        torch.set_num_threads(before)


def _measured(config: RunConfig, ranks: int) -> tuple[Costs, Size]:
    part = micro_batch(config, ranks) * config.train.gradient_accumulation
    task = load_task(config)
    cold = config.model_copy(update={"fisher": config.fisher.model_copy(update={"head_warmup": 0})})
    with mask_pass(cold, task, config.fisher.samples, "pool", progress=False) as drawn:
        load = time.perf_counter() - drawn.started
        size = _size(config, task, drawn)
        trace, gradient, ranking, mask = _passes(config, drawn.samples, Pair(len(drawn.places), drawn.k))
    begin, step, prediction = _training(config, task, mask, part)
    return Costs(trace, gradient, ranking, begin, step, prediction, load), size


def _size(config: RunConfig, task: Task, drawn: MaskPass) -> Size:
    start = Pair(len(drawn.places), drawn.k)
    minimum = smallest_pair(config, start, drawn.parameters)
    return Size(
        rounds=most_rounds(start, minimum, config.search.max_rounds),
        candidates=most_candidates(start, minimum),
        evaluations=most_evaluations(start, minimum, config.search.max_rounds, len(config.search.seeds)),
        steps=training_steps(config.train, len(task.trained)),
        samples=start.samples,
        rankings=len(reachable_sizes(start, minimum)[0]),
        selection=len(task.selection),
        test=len(task.test),
    )


def _passes(config: RunConfig, samples: SampleGradients, start: Pair) -> tuple[float, float, float, Mask]:
    """Seconds per sample of each pass and per ranking, and a mask of the search's largest size."""
    few = max(1, min(config.fisher.batch_size, start.samples // 3))
    many = min(3 * few, start.samples)
    traces = torch.zeros(start.samples, dtype=torch.float64)
    samples.add_traces(range(few), traces)
    trace = _seconds(lambda: samples.add_traces(range(many), traces)) / many

    def rank(count: int) -> Ranking:
        return ranked_entries_by_prefix(samples, range(count), [count], start.params, **pass_options(config))[count]

    mask = rank(1).prefix(start.params)
    short, long = _seconds(lambda: rank(few)), _seconds(lambda: rank(many))
    # A ranking too short to measure counts with the samples.
    gradient = (long - short) / (many - few) if long > short and many > few else long / many
    return trace, gradient, max(0.0, long - many * gradient), mask


def _training(config: RunConfig, task: Task, mask: Mask, batch_size: int) -> tuple[float, float, float]:
    """Seconds until a candidate's first step, per step, and per sample of an evaluation."""
    started, stamps = time.perf_counter(), list[float]()
    seed, size = config.search.seeds[0], config.train.eval_batch_size
    train = short_training(config.train, STEPS).model_copy(update={"batch_size": batch_size})
    control = Control(advance=lambda n=1: stamps.append(time.perf_counter()))
    with base_model(config, task, seed) as (model, new):
        make_sparse(config, model, new, mask, seed)
        built = time.perf_counter() - started
        fine_tune(model, task, config.model_copy(update={"train": train}), seed, control)
        split = task.selection.select(range(min(len(task.selection), 2 * size)))
        prediction = _seconds(lambda: evaluate_model(model, task, split, size)) / len(split)
    step = statistics.median(b - a for a, b in zip(stamps[FIRST:], stamps[FIRST + 1 :], strict=False))
    return built + max(0.0, stamps[1] - stamps[0] - step), step, prediction


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def search_seconds(
    config: RunConfig, costs: Costs, size: Size, at_once: int = 1, fisher_ranks: int = 1, trials_a_gpu: int = 1
) -> float:
    """Seconds of a search that uses all its rounds.

    Assumes that ranks share a Fisher pass without loss. Ray's own overhead, some seconds per round, is left out.

    Args:
        at_once: evaluations that run side by side; a round ends with its last one.
        fisher_ranks: ranks of a Fisher pass.
        trials_a_gpu: evaluations that share a GPU and its speed.
    """
    seeds = len(config.search.seeds)
    # Passes for traces, losses and masks, and for as many random samples of the baseline.
    of_masks = 2 * size.samples * costs.gradient
    passes = (size.samples * (config.traced * costs.trace + costs.prediction) + of_masks) / fisher_ranks
    if config.fisher.head_warmup:
        # Once for the pool and once for the random samples. A step of the head takes at most a full step.
        passes += 2 * (costs.begin + config.fisher.head_warmup * costs.step)
    # The last step's evaluation comes on top of the one that ends the training.
    measures = 1 + (0 if config.train.eval_steps is None else ceil(size.steps / config.train.eval_steps))
    computing = size.steps * costs.step + measures * size.selection * costs.prediction
    groups = [pairs * seeds for pairs in (1, *[size.candidates] * size.rounds, 2)]
    waves = sum(ceil(evaluations / at_once) for evaluations in groups)
    turns = sum(shared_turns(evaluations, at_once, trials_a_gpu) for evaluations in groups)
    evaluations = waves * costs.begin + turns * computing
    tests = 3 * seeds * (costs.begin + size.test * costs.prediction)
    # Processes load side by side; with several, evaluations have other processes than the passes.
    loads = (1 if at_once == 1 else 2) * costs.load
    return loads + passes + (size.rankings + 1) * costs.ranking + evaluations + tests
