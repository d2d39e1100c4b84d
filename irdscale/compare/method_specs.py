"""The methods of a comparison, and the ranking of samples that each one uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from irdscale.config.compare import SCORED, SPARSE_LORA, LoraConfig, spelled_out
from irdscale.config.loader import changed_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError

# Methods whose masks come from a ranking of the samples -> direction of the ranking.
RANKINGS: dict[str, Literal["ird", "reverse", "random"]] = {
    "ird": "ird",
    "reverse": "reverse",
    "fish_best": "ird",
    "fish": "ird",
    "fish_small": "random",
    "top_samples": "ird",
    "bottom_samples": "reverse",
    SPARSE_LORA: "ird",
}
SEARCHES = ("ird", "reverse")
# Methods with one mask, from a search's smallest sample set.
FEW = ("fish_small", "top_samples", "bottom_samples")
# Methods whose masks rank no samples -> their score.
DRAWN = {"random_mask": "random", "magnitude_mask": "magnitude"} | {name: name for name in SCORED}
DENSE = ("lora", "bitfit", "linear_probe", "full")
# Offset of the seeds of further trainings, larger than any seed in `compare.seeds`.
RESTART = 10**6
# Largest difference of equal numbers of trained parameters, as a share of the mask's.
FAR = 0.05

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
    "lora": ("LoRA", "LoRA matrices (PEFT)"),
    "bitfit": ("BitFit", "all biases"),
    "linear_probe": ("linear probe", "the new head alone"),
    "full": ("full fine-tuning", "all parameters"),
    "ird_layerwise": ("IRD, layerwise", "the search with layerwise masks"),
    "fish_layerwise": ("FISH, layerwise", "one layerwise mask of all drawn samples"),
    "random_layerwise": (
        "random mask, layerwise",
        "entries drawn at random from each parameter, in proportion to its size",
    ),
    SPARSE_LORA: (
        "sparse + LoRA",
        "half a FISH mask of all drawn samples, and LoRA matrices (PEFT) for the other half",
    ),
    "supertuning": ("Super-Tuning", "the largest weights of each parameter (arXiv 2607.09287)"),
    "supertuning_bottom": ("Super-Tuning, bottom", "the smallest weights of each parameter (arXiv 2607.09287)"),
    "supertuning_inputs": (
        "Super-Tuning, inputs",
        "the largest |weight| x mean |input| of each parameter (arXiv 2607.09287)",
    ),
    "rslora": ("rsLoRA", "LoRA matrices (PEFT) with the rank-stabilised scale"),
    "dora": ("DoRA", "LoRA matrices and norms of each output's weights (PEFT)"),
    "shira": ("SHiRA", "random entries of each weight (PEFT), as many as LoRA matrices"),
}


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: name in the configuration.
        kind: the one of `METHODS` that it is, maybe with other options.
        config: the run's configuration with the variant's changes.
        variant: whether it is of `compare.variants`.
    """

    name: str
    kind: str
    config: RunConfig
    variant: bool

    @property
    def label(self) -> str:
        """Name in tables and text."""
        return self.name if self.variant else WORDS[self.name][0]

    def what(self, rank: int | None = None) -> str:
        """One-line description; `rank` is that of its adapter."""
        changes = self.config.compare.variants[self.name] if self.variant else [self.name]
        words = WORDS[changes[0]][1]
        if self.lora is not None:
            words += _in_words(self.lora, rank)
        return "; ".join([words, *([", ".join(changes[1:])] if changes[1:] else [])])

    @property
    def lora(self) -> LoraConfig | None:
        """Options of its adapter; None without one."""
        if self.kind == SPARSE_LORA:
            # The matrices share one budget with the mask, and read no weights, which the mask changes.
            return self.config.compare.lora.model_copy(update={"rank": "auto", "form": "lora"})
        return self.config.compare.lora if self.kind == "lora" else None

    def of_seed(self, seed: int) -> RunConfig:
        """The configuration of the Fisher passes of one seed."""
        search = self.config.search.model_copy(update={"seeds": [seed]})
        return self.config.model_copy(
            update={"search": search, "fisher": self.config.fisher.model_copy(update={"seed": seed})}
        )


def _in_words(lora: LoraConfig, rank: int | None) -> str:
    """The rank and the layers of an adapter."""
    layers = "all linear layers" if lora.targets is None else ", ".join(lora.targets)
    return f", rank {rank or lora.rank}, in {layers}"


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


def check_comparison(config: RunConfig) -> None:
    """Check what the configuration alone can tell of a comparison.

    Raises:
        InputError: candidates would be stopped early, a variant's changes are invalid, or as `check_methods`.
    """
    if config.search.runner == "ray" and config.search.ray.early_stopping:
        expected = "false: a comparison evaluates every candidate in full"
        raise InputError("found true", expected, key="search.ray.early_stopping")
    check_methods(config, asked_methods(config))


def check_methods(config: RunConfig, methods: Sequence[Method]) -> None:
    """Check that the methods of a comparison have the others that they need.

    Raises:
        InputError: one is missing, or the reference is none of them.
    """
    names = [method.name for method in methods]
    for method in methods:
        if method.kind == "fish_best" and "ird" not in names:
            expected = "both, because it draws as often as ird evaluates"
            raise InputError(f"found {method.name} without ird", expected, key="compare.methods")
    if config.compare.reference not in (None, *names):
        expected = f"one of the methods: {', '.join(names)}"
        raise InputError(f"found {config.compare.reference!r}", expected, key="compare.reference")


def asked_methods(config: RunConfig) -> list[Method]:
    """The methods that the configuration names, or all.

    Raises:
        InputError: a variant's changes, or a method's score with `fisher.objective`, are invalid.
    """
    return [_method(config, name) for name in config.compare.asked]


def rates_of(config: RunConfig, name: str) -> list[float]:
    """The learning rates that a method tries."""
    return config.compare.rates_of(name) or [config.train.learning_rate]


def _method(config: RunConfig, name: str) -> Method:
    kind, *changes = spelled_out(name, config.compare.variants)
    direction = RANKINGS.get(kind, "ird")
    own = config.model_copy(update={"search": config.search.model_copy(update={"direction": direction})})
    if kind in DRAWN:
        own = changed_config(own, [f"fisher.score={DRAWN[kind]}"], f"compare.methods: {kind}")
    where = f"compare.variants.{name}"
    changed = changed_config(own, changes, where) if changes else own
    return Method(name, kind, changed, name in config.compare.variants)
