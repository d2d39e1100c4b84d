"""The methods of a comparison, and the ranking of samples that each one uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from irdscale.config.compare import METHODS
from irdscale.config.loader import changed_config
from irdscale.config.schema import BY_MEAN_GRADIENT, RunConfig

# Methods whose masks come from a ranking of the samples -> direction of the ranking.
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
# Methods with one mask, from a search's smallest sample set.
FEW = ("fish_small", "top_samples", "bottom_samples")
# Methods with one mask of all drawn samples by another score than the Fisher information, which has their name.
SCORED = ("activation", "gem", "gallop")
# Methods whose masks rank no samples -> their score.
DRAWN = {"random_mask": "random", "magnitude_mask": "magnitude"} | {name: name for name in SCORED}
DENSE = ("lora", "bitfit", "linear_probe", "full")
# Offset of the seeds of further trainings, larger than any seed in `compare.seeds`.
RESTART = 10**6

WORDS = {
    "ird": ("IRD", "the search, which keeps the samples with the larger traces"),
    "reverse": ("reverse IRD", "the same search, which keeps the samples with the smaller traces"),
    "fish_best": (
        "FISH, best of draws",
        "the best of random draws: one of the same size for each pair that IRD evaluated",
    ),
    "fish": ("FISH", "one mask of all drawn samples: the start of IRD"),
    "fish_small": ("FISH, fewest samples", "one mask of the fewest samples of the search, drawn at random"),
    "top_samples": ("largest traces", "one mask of the fewest samples of the search, those with the largest traces"),
    "bottom_samples": ("smallest traces", "one mask of the fewest samples, those with the smallest traces"),
    "random_mask": ("random mask", "entries drawn at random"),
    "magnitude_mask": ("magnitude mask", "the largest weights"),
    "activation": (
        "activation",
        "one mask of all drawn samples: the largest |weight| x norm of its input (Wanda's score)",
    ),
    "gem": ("GEM", "one mask of all drawn samples: the largest |mean gradient / weight|"),
    "gallop": ("GaLLoP", "one mask of all drawn samples: the largest |mean gradient| of small weights"),
    "lora": ("LoRA", "LoRA matrices (PEFT) in all linear layers"),
    "bitfit": ("BitFit", "all biases"),
    "linear_probe": ("linear probe", "the new head alone"),
    "full": ("full fine-tuning", "all parameters"),
}


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: name in the configuration.
        kind: one of `METHODS`.
        config: the run's configuration with the variant's changes.
        variant: whether it comes from `compare.variants`.
    """

    name: str
    kind: str
    config: RunConfig
    variant: bool

    @property
    def label(self) -> str:
        """Name in tables and text."""
        return self.name if self.variant else WORDS[self.kind][0]

    @property
    def what(self) -> str:
        """One-line description."""
        changes = ", ".join(self.config.compare.variants[self.name][1:]) if self.variant else ""
        return f"{WORDS[self.kind][1]}; {changes}" if changes else WORDS[self.kind][1]

    def of_seed(self, seed: int) -> RunConfig:
        """The configuration of the Fisher passes of one seed."""
        search = self.config.search.model_copy(update={"seeds": [seed]})
        return self.config.model_copy(
            update={"search": search, "fisher": self.config.fisher.model_copy(update={"seed": seed})}
        )


def slug(name: str) -> str:
    """A method's name for use in file names."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def owner_of(methods: Sequence[Method], method: Method, seed: int) -> Method:
    """The first method with the same ranking, whose masks this method shares."""
    own = method.of_seed(seed)
    return next(one for one in methods if one.kind in RANKINGS and one.of_seed(seed) == own)


def ranking_name(owner: Method, seed: int) -> str:
    """Folder name of a method's own ranking."""
    return f"{slug(owner.name)}-{seed}"


def asked_methods(config: RunConfig) -> list[Method]:
    """The methods that the configuration names, or all that its objective allows.

    Raises:
        InputError: a variant's changes, or a method's score with `fisher.objective`, are invalid.
    """
    by_mean = () if config.fisher.objective != "expected" else BY_MEAN_GRADIENT
    all_methods = [name for name in METHODS if DRAWN.get(name) not in by_mean]
    names = config.compare.methods or [*all_methods, *config.compare.variants]
    return [_method(config, name) for name in names]


def _method(config: RunConfig, name: str) -> Method:
    kind, *changes = config.compare.variants.get(name, [name])
    direction = RANKINGS.get(kind, "ird")
    own = config.model_copy(update={"search": config.search.model_copy(update={"direction": direction})})
    if kind in DRAWN:
        own = changed_config(own, [f"fisher.score={DRAWN[kind]}"], f"compare.methods: {kind}")
    where = f"compare.variants.{name}"
    return Method(name, kind, changed_config(own, changes, where) if changes else own, name not in METHODS)
