"""The Fisher passes of a configuration: its samples, scored parameters, options and results."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from irdscale.config.schema import RunConfig
from irdscale.distributed.zero3 import numel_of, to_gpu
from irdscale.errors import InputError
from irdscale.fisher.accumulate import scored_parameters
from irdscale.fisher.activations import of_linear_layers
from irdscale.fisher.checkpoint import SavedPass
from irdscale.fisher.memory_check import groups_for
from irdscale.fisher.nested import rank_samples, ranked_entries_by_prefix
from irdscale.fisher.passes import SampleGradients
from irdscale.fisher.scores import OF_INPUTS, summed
from irdscale.masks.mask import Ranking
from irdscale.models.build import decoder_linears
from irdscale.models.chunked_losses import IGNORED

if TYPE_CHECKING:
    from irdscale.tasks import Task


def draw_seed(config: RunConfig) -> int:
    """The seed of all draws of samples."""
    return config.task.split_seed if config.fisher.seed is None else config.fisher.seed


def draw_samples(config: RunConfig, task: Task, count: int, purpose: str) -> list[int]:
    """Places of `count` samples of the population, drawn without replacement by `fisher.seed` and the purpose."""
    generator = random.Random(f"{purpose}/{draw_seed(config)}")
    return sorted(generator.sample(range(len(task.population)), count))


def sample_gradients(
    config: RunConfig, task: Task, model: nn.Module, places: Sequence[int], dense: Sequence[str]
) -> SampleGradients:
    """The gradients of the population's samples at `places`; moves the model to the GPU if there is one.

    With `train.gradient_checkpointing` the Fisher passes keep only the layers' inputs too.

    Args:
        dense: names of the parameters that are trained outside any mask, and not scored
    """
    to_gpu(model)
    if config.train.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
    return SampleGradients(
        model,
        task.population.select(list(places)),
        task.collate,
        scored_of(config, model, dense, task.is_language),
        batch_size=config.fisher.batch_size,
        objective=config.fisher.objective,
        token_reduction=config.fisher.token_reduction,
        seed=draw_seed(config),
    )


def ranked_samples(
    config: RunConfig, task: Task, samples: SampleGradients, traces: Tensor, losses: Tensor
) -> list[int]:
    """Places of the samples, ranked by `search.rank_by` and `search.direction`.

    Args:
        traces: float64 [N], Fisher traces; not used if `search.direction` is `random`
        losses: float64 [N], losses of the samples' labels
    """
    search, values = config.search, traces
    if search.rank_by == "length":
        tokens = torch.tensor(_tokens(task, samples.dataset), dtype=torch.float64)
        # The squared gradient of a sum over n tokens is n^2 times that of the mean.
        summed = task.is_language and config.fisher.token_reduction == "sum"
        values = traces / tokens if summed else traces * tokens
    elif search.rank_by == "loss":
        values = torch.where(losses > 0, traces / losses, 0.0)
    return rank_samples(values, search.direction, draw_seed(config))


def _tokens(task: Task, rows: Any) -> list[int]:
    """Number of target tokens of each text; for other tasks, of all tokens."""
    if task.is_language:
        return [sum(label != IGNORED for label in labels[1:]) for labels in rows["labels"]]
    return [len(ids) for ids in rows["input_ids"]]


def scored_of(config: RunConfig, model: nn.Module, dense: Sequence[str], language: bool) -> dict[str, nn.Parameter]:
    """The parameters whose entries a mask may hold; the default of a language model is its decoder blocks' matrices.

    A score of inputs takes the weights of linear layers alone.

    Args:
        dense: names of the parameters that are trained outside any mask

    Raises:
        InputError: an expression of `fisher.include` or `fisher.exclude` is malformed, or no parameter matches.
    """
    exclude = [*(config.fisher.exclude or ()), *(f"^{re.escape(name)}$" for name in dense)]
    include = config.fisher.include
    if include is None and language:
        include = [f"^({'|'.join(map(re.escape, decoder_linears(cast(Any, model))))})$"]
    scored = scored_parameters(model, include, exclude)
    if config.fisher.score not in OF_INPUTS:
        return scored
    linear = of_linear_layers(model, scored)
    if not linear:
        found = f"found {config.fisher.score} with {next(iter(scored))} and no linear layer's weight to score"
        raise InputError(found, "weights of linear layers by fisher.include", "fisher.score")
    return linear


def scored_by(config: RunConfig, task: Task) -> str:
    """A description of the parameters that `sample_gradients` scores."""
    include, exclude = config.fisher.include, config.fisher.exclude
    by_default = (
        "all linear layers of the decoder blocks" if task.is_language else "all parameters outside the new head"
    )
    chosen = by_default if include is None else f"parameters that match {' or '.join(include)}"
    if config.fisher.score in OF_INPUTS:
        chosen = f"weights of linear layers among {chosen}"
    return chosen if not exclude else f"{chosen}, except those that match {' or '.join(exclude)}"


def pass_options(config: RunConfig) -> dict[str, Any]:
    """The options of `ranked_entries_by_prefix`."""
    return {
        "score": config.fisher.score,
        "scope": config.scope,
        "dtype": torch.float64 if config.fisher.dtype == "float64" else torch.float32,
        "layout": config.fisher.layout,
        "offload": config.fisher.offload,
    }


def ranked_entries(
    config: RunConfig,
    samples: SampleGradients,
    order: Sequence[int],
    sizes: Sequence[int],
    k: int,
    name: str,
    **more: Any,
) -> dict[int, Ranking]:
    """`ranked_entries_by_prefix` by a configuration; `name` is that of the pass's saved state."""
    options, names, groups = {**pass_options(config), **more}, [name], list[list[str]]()
    if config.fisher.passes != 1 and summed(config.fisher.score) is not None:
        # Checks of the ranks' work, and a choice of how to take batches, come before the free memory is read.
        samples.prepare(order)
        groups = groups_for(samples, config.fisher.passes, options["dtype"], options["layout"], options["offload"])
        names = names if len(groups) == 1 else [f"{name}-part-{place}" for place in range(len(groups))]
    saved = [saved_pass(config, each) for each in names]
    return ranked_entries_by_prefix(samples, order, sizes, k, groups=groups, saved=saved, **options)


def saved_pass(config: RunConfig, name: str) -> SavedPass:
    """The saved state of one of the run's passes; a state of another head or scope is not used."""
    steps = config.fisher.head_warmup
    by = config.train.model_dump(mode="json", exclude={"eval_steps", "keep", "report_to"}) if steps else None
    also = {"scope": config.scope, "seed": config.search.seeds[0], "steps": steps, "by": by}
    return SavedPass(Path(config.output) / "fisher" / f"state-{name}", config.fisher.save_minutes, also)


def mask_size(config: RunConfig, model: nn.Module, scored: int, dense: int) -> int:
    """K = round(search.ratio * parameters of the model), less `dense` with `search.count_head`.

    FISH's script counts so: the new head is a part of the trained share (arXiv 2111.09839, generate_masks.py).

    Args:
        scored: number of entries that a mask may hold
        dense: number of entries that are trained outside the mask, such as a new head's

    Raises:
        InputError: K is below 1 or above `scored`.
    """
    total = sum(map(numel_of, model.parameters()))
    counted = dense if config.search.count_head else 0
    k = round(config.search.ratio * total) - counted
    if not 1 <= k <= scored:
        beside = f" beside {counted} of the head" if config.search.count_head else ""
        found = f"found {config.search.ratio}, which gives {k} of {total} parameters{beside}"
        raise InputError(found, f"1 to {scored}, the scored ones", "search.ratio")
    return k


def traces_of(task: Task, pool: Sequence[int], traces: Tensor) -> dict[str, Any]:
    """Each pool sample's row in its split, Fisher trace, number of tokens and label (for texts: number of targets).

    With `task.pool` also whether the sample is `altered`.
    """
    chosen = task.population.select(list(pool))
    labels = list(chosen["labels"])
    if task.is_language:
        labels = [sum(label != IGNORED for label in sample) for sample in labels]
    return {
        "row": list(chosen["row"]),
        "trace": traces.tolist(),
        "length": [len(ids) for ids in chosen["input_ids"]],
        "label": labels,
        **({"altered": list(chosen["altered"])} if "altered" in chosen.column_names else {}),
    }
