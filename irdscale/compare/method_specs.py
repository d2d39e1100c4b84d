"""The methods that a comparison is asked for, and whose ranking of samples each one uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from irdscale.config.compare import METHODS
from irdscale.config.loader import changed_config
from irdscale.config.schema import RunConfig

# Whose masks come from the sample sets of one ranking, and of which.
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
        """The configuration of the passes of one repetition."""
        search = self.config.search.model_copy(update={"seeds": [seed]})
        return self.config.model_copy(
            update={"search": search, "fisher": self.config.fisher.model_copy(update={"seed": seed})}
        )


def slug(name: str) -> str:
    """A method's name as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def owner_of(methods: Sequence[Method], method: Method, seed: int) -> Method:
    """Whose ranking a method uses: the first method's with an equal one."""
    own = method.of_seed(seed)
    return next(one for one in methods if one.kind in RANKINGS and one.of_seed(seed) == own)


def ranking_name(owner: Method, seed: int) -> str:
    """What the folder of a method's own ranking is called."""
    return f"{slug(owner.name)}-{seed}"


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


def described(method: Method) -> dict[str, Any]:
    """How a method is named in the result."""
    return {"name": method.name, "label": method.label, "what": method.what}
