"""The methods of a comparison, and what each one trains."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from irdscale.config import METHODS, RunConfig
from irdscale.config_file import changed_config
from irdscale.errors import InputError
from irdscale.fisher.pool import scored_by, scored_of
from irdscale.lora import insert_lora
from irdscale.partitioned import numel_of
from irdscale.search.candidates import Candidate
from irdscale.search.ird import Pair
from irdscale.tasks import build_model
from irdscale.training import trained_whole

if TYPE_CHECKING:
    from irdscale.tasks import Task

# Whose masks come from the lattice of one ranking, and of which.
RANKINGS: dict[str, Literal["ird", "reverse", "random"]] = {
    "ird": "ird",
    "reverse": "reverse",
    "fish_best": "ird",
    "fish": "ird",
    "fish_small": "random",
    "top_samples": "ird",
    "bottom_samples": "reverse",
}
SEARCHES = ("ird", "reverse")
# Whose mask is that of the fewest samples of a search.
FEW = ("fish_small", "top_samples", "bottom_samples")
# Masks that no sample is read for.
DRAWN: dict[str, Literal["random", "magnitude"]] = {"random_mask": "random", "magnitude_mask": "magnitude"}
DENSE = ("lora", "bitfit", "linear_probe", "full")
# Far from any seed that `compare.seeds` may hold.
RESTART = 10**6

WORDS = {
    "ird": ("IRD", "the search: samples with the larger traces, evaluated round by round"),
    "reverse": ("reverse IRD", "the same search with the samples of the smaller traces"),
    "fish_best": ("FISH, best of draws", "for each pair that IRD evaluated a random draw of as many samples; the best"),
    "fish": ("FISH", "one mask of all samples drawn: where IRD starts"),
    "fish_small": ("FISH, fewest samples", "one mask of the fewest samples of the search, drawn at random"),
    "top_samples": ("largest traces", "one mask of the fewest samples of the search, those with the largest traces"),
    "bottom_samples": ("smallest traces", "one mask of the fewest samples, those with the smallest traces"),
    "random_mask": ("random mask", "entries drawn at random"),
    "magnitude_mask": ("magnitude mask", "the largest weights"),
    "lora": ("LoRA", "LoRA matrices (PEFT) in all linear layers"),
    "bitfit": ("BitFit", "all biases"),
    "linear_probe": ("linear probe", "the new head alone"),
    "full": ("full fine-tuning", "all parameters"),
}


@dataclass(frozen=True)
class Method:
    """A method as the configuration asks for it.

    Attributes:
        name: what the configuration calls it.
        kind: of `METHODS`.
        config: the run's, with what a variant changes.
        variant: whether it is one.
    """

    name: str
    kind: str
    config: RunConfig
    variant: bool

    @property
    def label(self) -> str:
        """What people read."""
        return self.name if self.variant else WORDS[self.kind][0]

    @property
    def what(self) -> str:
        """What it is, in words."""
        changes = ", ".join(self.config.compare.variants[self.name][1:]) if self.variant else ""
        return f"{WORDS[self.kind][1]}; {changes}" if changes else WORDS[self.kind][1]

    def of_seed(self, seed: int) -> RunConfig:
        """The configuration of the passes and the search of one repetition."""
        search = self.config.search.model_copy(update={"seeds": [seed]})
        return self.config.model_copy(
            update={"search": search, "fisher": self.config.fisher.model_copy(update={"seed": seed})}
        )


@dataclass(frozen=True)
class ModelFacts:
    """What methods need to know of the model.

    Attributes:
        head, biases: names of the new head's parameters, and of the other biases.
        sizes: dense method -> parameters that it trains beside the head.
        model: `parameters`, those of the `head`, the `scored` ones and what they are (`scored_by`).
    """

    head: list[str]
    biases: list[str]
    sizes: dict[str, int]
    model: dict[str, Any]


def model_facts(config: RunConfig, task: Task, output: Path, lora: bool) -> ModelFacts:
    """Build the model once, and count; collective.

    Args:
        lora: count LoRA's matrices too.

    Raises:
        InputError: as `build_model` and `insert_lora`.
    """
    model, new = build_model(config, task, config.compare.seeds[0])
    head = trained_whole(config, model, new)
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
    if lora:
        matrices = insert_lora(model, config.compare.lora_rank, 0, head)
        parameters = dict(model.named_parameters())
        counted["lora"] = sum(numel_of(parameters[name]) for name in matrices)
    return ModelFacts(head, biases, counted, facts)


def asked_methods(config: RunConfig) -> list[Method]:
    """The methods that the configuration names, or all, with their configurations.

    Raises:
        InputError: a variant's changes are not valid.
    """
    names = config.compare.methods or [*METHODS, *config.compare.variants]
    return [_method(config, name) for name in names]


def _method(config: RunConfig, name: str) -> Method:
    kind, *changes = config.compare.variants.get(name, [name])
    direction = RANKINGS.get(kind, "ird")
    own = config.model_copy(update={"search": config.search.model_copy(update={"direction": direction})})
    if kind in DRAWN:
        own = own.model_copy(update={"fisher": own.fisher.model_copy(update={"score": DRAWN[kind]})})
    where = f"compare.variants.{name}"
    return Method(name, kind, changed_config(own, changes, where) if changes else own, name not in METHODS)


def fitting_methods(config: RunConfig, facts: ModelFacts) -> list[Method]:
    """The methods of the comparison: those asked for, or all that the model has parameters for.

    Raises:
        InputError: one that was asked for has none, or lacks what it is compared with.
    """
    methods = asked_methods(config)
    lacking = {"linear_probe": not facts.head, "bitfit": not facts.biases}
    if config.compare.methods is None:
        methods = [method for method in methods if not lacking.get(method.kind)]
    names = [method.name for method in methods]
    for method in methods:
        if lacking.get(method.kind):
            there = "no new head" if method.kind == "linear_probe" else "no biases"
            raise InputError(f"compare.methods: found {method.name}, but the model has {there}; expected others")
        if method.kind == "fish_best" and "ird" not in names:
            raise InputError(
                f"compare.methods: found {method.name} without ird; expected both: it draws as often as ird evaluates"
            )
    if config.compare.reference not in (None, *names):
        raise InputError(
            f"compare.reference: found {config.compare.reference!r}; expected one of the methods: {', '.join(names)}"
        )
    return methods


def dense_candidate(method: Method, facts: ModelFacts, rate: float, seed: int) -> Candidate:
    """The candidate of a method without a mask."""
    train = method.config.train.model_copy(update={"learning_rate": rate})
    if method.kind in ("bitfit", "full"):
        names = [*facts.head, *facts.biases] if method.kind == "bitfit" else None
        patterns = ["."] if names is None else [f"^{re.escape(name)}$" for name in names]
        train = train.model_copy(update={"always_train": patterns})
    rank = method.config.compare.lora_rank if method.kind == "lora" else None
    return Candidate(None, Pair(0, facts.sizes[method.kind]), seed, None, method.name, train, rank)


def trained(method: Method, candidate: Candidate, rate: float) -> Candidate:
    """The candidate with a method's training at a learning rate; what is trained besides a mask stays."""
    train = (candidate.train or method.config.train).model_copy(update={"learning_rate": rate})
    return replace(candidate, train=train)


def described(method: Method) -> dict[str, Any]:
    """How a method is named in the result."""
    return {"name": method.name, "label": method.label, "what": method.what}
