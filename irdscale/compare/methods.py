"""What each method of a comparison trains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from irdscale.compare.method_specs import FAR, Method, asked_methods, check_methods
from irdscale.config.compare import SPARSE_LORA, LoraConfig
from irdscale.config.schema import RunConfig
from irdscale.distributed.zero3 import numel_of
from irdscale.errors import InputError
from irdscale.fisher.pool import scored_by, scored_of
from irdscale.models.lora import lora_layers, lora_rank, lora_size
from irdscale.search.candidates import Candidate
from irdscale.search.ird import Pair
from irdscale.training.base_model import base_model
from irdscale.training.trainable import trained_densely

if TYPE_CHECKING:
    from irdscale.tasks import Task


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the model.

    Attributes:
        head, biases: names of the new head's parameters, and of all other biases.
        sizes: dense method -> parameters that it trains beside the head; those of LoRA by name, others by kind.
        model: "parameters", "head", "scored" (entries) and "scored_by" (text).
        ranks: name of a method with LoRA matrices -> their rank.
    """

    head: list[str]
    biases: list[str]
    sizes: dict[str, int]
    model: dict[str, Any]
    ranks: dict[str, int] = field(default_factory=dict)


def model_facts(config: RunConfig, task: Task, output: Path, lora: bool) -> ModelFacts:
    """Count the model's parameters by method; collective.

    Args:
        lora: whether to count LoRA matrices.

    Raises:
        InputError: as `base_model` and `irdscale.models.lora.insert_lora`.
    """
    with base_model(config, task, config.compare.seeds[0]) as (model, new):
        return _counted(config, task, model, trained_densely(config, model, new), lora)


def _counted(config: RunConfig, task: Task, model: nn.Module, head: list[str], lora: bool) -> ModelFacts:
    sizes = {name: numel_of(parameter) for name, parameter in model.named_parameters()}
    biases = [name for name in sizes if name.endswith("bias") and name not in head]
    counted = {
        "full": sum(size for name, size in sizes.items() if name not in head),
        "bitfit": sum(sizes[name] for name in biases),
        "linear_probe": 0,
    }
    scored = scored_of(config, model, head, task.is_language)
    facts = {
        "parameters": sum(sizes.values()),
        "head": sum(sizes[name] for name in head),
        "scored": sum(map(numel_of, scored.values())),
        "scored_by": scored_by(config, task),
    }
    ranks: dict[str, int] = {}
    for method in asked_methods(config) if lora else ():
        if method.lora is not None:
            layers = lora_layers(model, method.lora, head)
            ranks[method.name] = lora_rank(layers, method.lora, _budget(method, facts))
            counted[method.name] = lora_size(layers, method.lora, ranks[method.name])
    return ModelFacts(head, biases, counted, facts, ranks)


def _budget(method: Method, model: dict[str, Any]) -> int:
    """Entries of a mask, which LoRA of rank `auto` has as many parameters as; half of them beside half a mask."""
    search = method.config.search
    k = max(1, round(search.ratio * model["parameters"]) - (model["head"] if search.count_head else 0))
    return k - k // 2 if method.kind == SPARSE_LORA else k


def far_from_budget(methods: Sequence[Method], facts: ModelFacts) -> list[str]:
    """A line on each method of rank `auto` whose trained parameters differ from the mask's by more than 5 %."""
    lines = []
    for method in methods:
        if method.lora is not None and method.lora.rank == "auto":
            size, budget = facts.sizes[method.name], _budget(method, facts.model)
            if abs(size - budget) > FAR * budget:
                mask = "half a mask" if method.kind == SPARSE_LORA else "a mask"
                more, rank = 100 * (size / budget - 1), facts.ranks[method.name]
                lines.append(
                    f"{method.label} trains {size:,} parameters with the nearest rank ({rank}), {mask} {budget:,} "
                    f"({more:+.0f} %); other layers (compare.lora.targets) may come nearer."
                )
    return lines


def fitting_methods(config: RunConfig, facts: ModelFacts) -> list[Method]:
    """The methods of the configuration; by default all that the model has parameters for.

    Raises:
        InputError: the model has no parameters for a named method, or the method needs another one.
    """
    methods = asked_methods(config)
    lacking = {
        "linear_probe": "" if facts.head else "the model has no new head",
        "bitfit": "" if facts.biases else "the model has no biases",
        "full": "quantised weights cannot be trained densely" if config.model.quantize else "",
    }
    if config.compare.methods is None:
        methods = [method for method in methods if not lacking.get(method.kind)]
    for method in methods:
        if lacking.get(method.kind):
            found = f"found {method.name}, but {lacking[method.kind]}"
            raise InputError(found, "other methods", key="compare.methods")
    check_methods(config, methods)
    return methods


def dense_candidate(method: Method, facts: ModelFacts, rate: float, seed: int) -> Candidate:
    """The candidate of a method without a mask."""
    train = method.config.train.model_copy(update={"learning_rate": rate})
    if method.kind in ("bitfit", "full"):
        names = [*facts.head, *facts.biases] if method.kind == "bitfit" else None
        patterns = ["."] if names is None else [f"^{re.escape(name)}$" for name in names]
        train = train.model_copy(update={"always_train": patterns})
    lora = ranked(method, facts)
    size = facts.sizes[method.kind if lora is None else method.name]
    return Candidate(None, Pair(0, size), seed, None, method.name, train, lora)


def with_lora(method: Method, facts: ModelFacts, half: Candidate) -> Candidate:
    """The candidate that trains LoRA matrices beside a mask."""
    pair = Pair(half.pair.samples, half.pair.params + facts.sizes[method.name])
    return replace(half, pair=pair, lora=ranked(method, facts))


def ranked(method: Method, facts: ModelFacts) -> LoraConfig | None:
    """The options of a method's adapter, with its rank; None without an adapter."""
    return None if method.lora is None else method.lora.model_copy(update={"rank": facts.ranks[method.name]})


def trained(method: Method, candidate: Candidate, rate: float) -> Candidate:
    """The candidate with a method's training configuration at a learning rate; its `always_train` stays."""
    train = (candidate.train or method.config.train).model_copy(update={"learning_rate": rate})
    return replace(candidate, train=train)
