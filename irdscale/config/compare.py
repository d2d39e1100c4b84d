"""The section `compare` of a configuration."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from irdscale.config.section import Section, check_distinct
from irdscale.errors import InputError
from irdscale.utils.suggestions import nearest

# What `irdscale compare` compares if `compare.methods` is unset; irdscale/compare/method_specs.py describes each one.
METHODS = (
    "ird",
    "reverse",
    "fish_best",
    "fish",
    "fish_small",
    "top_samples",
    "bottom_samples",
    "random_mask",
    "magnitude_mask",
    "lora",
    "bitfit",
    "linear_probe",
    "full",
)
# Methods with one mask of all drawn samples by another score than the Fisher information, which has their name.
SCORED = ("activation", "gem", "gallop")
# Half the entries of a FISH mask, and LoRA matrices with as many parameters.
SPARSE_LORA = "sparse_lora"
# Further methods that are one of these with other options.
PRESETS = {
    "ird_layerwise": ["ird", "fisher.scope=layerwise"],
    "fish_layerwise": ["fish", "fisher.scope=layerwise"],
    "random_layerwise": ["random_mask", "fisher.scope=layerwise"],
    "supertuning": ["magnitude_mask", "fisher.scope=layerwise"],
    "supertuning_bottom": ["magnitude_mask", "fisher.scope=layerwise", "fisher.score=small_magnitude"],
    "supertuning_inputs": ["activation", "fisher.scope=layerwise", "fisher.score=mean_activation"],
    "rslora": ["lora", "compare.lora.rslora=true"],
    "dora": ["lora", "compare.lora.form=dora"],
    "shira": ["lora", "compare.lora.form=shira"],
}
KNOWN = (*METHODS, *SCORED, SPARSE_LORA, *PRESETS)
VARIED_SECTIONS = ("fisher", "search", "compare.lora")
# The key of `compare.learning_rates` for methods that it does not name.
DEFAULT = "default"


def _check_rank(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise InputError(f"found {value!r}", "an integer >= 1, or auto")


class LoraConfig(Section):
    form: Literal["lora", "dora", "shira"] = Field(
        "lora",
        description="Form of the adapter: two matrices for each layer (lora), norms of its rows too (dora), or as "
        "many entries of each weight as the matrices have, drawn at random (shira).",
    )
    rank: Annotated[int | Literal["auto"], BeforeValidator(_check_rank)] = Field(
        8,
        description="Rank of the LoRA matrices; `auto`: the rank whose trained parameters are nearest to the mask's.",
    )
    targets: Annotated[list[str] | None, AfterValidator(check_distinct)] = Field(
        None,
        min_length=1,
        description="Names of the linear layers that get LoRA matrices, or their ends, such as [q_proj, v_proj]; all "
        "but the head if unset.",
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="Scale of LoRA: the matrices' product is multiplied by alpha / rank; twice the rank if unset.",
    )
    rslora: bool = Field(
        False,
        description="Rank-stabilised scale (rsLoRA, arXiv 2312.03732): alpha / sqrt(rank) instead of alpha / rank.",
    )


def _check_rates(value: Any, key: str = "") -> None:
    """Refuse what is not a list of distinct learning rates; `key` is its key in `compare.learning_rates`."""
    if not isinstance(value, list) or not value:
        written = (
            f": write [{value}]"
            if isinstance(value, int | float) and not isinstance(value, bool)
            else " of learning rates"
        )
        raise InputError(f"found {value!r}", f"a list{written}", key)
    for place, rate in enumerate(value):
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < float("inf"):
            raise InputError(f"found {rate!r}", "a number > 0", f"{key}.{place}".lstrip("."))
    if len(set(value)) != len(value):
        raise InputError(f"found {value}", "distinct values", key)


class CompareConfig(Section):
    methods: Annotated[list[str] | None, AfterValidator(check_distinct)] = Field(
        None,
        min_length=1,
        description="Methods, and names of `variants`. If unset, all variants, and the methods from `ird` to `full` "
        "that suit the model.",
    )
    variants: dict[str, list[str]] = Field(
        default_factory=dict,
        description="Variants: a name, and a method with what it changes, such as [ird, search.max_rounds=2].",
    )
    reference: str | None = Field(None, description="Method that all others are compared with; the first if unset.")
    learning_rates: list[float] | dict[str, list[float]] | None = Field(
        None,
        description="Learning rates that every method tries, or a list for each method, all of one length, such as "
        "{lora: [1e-4, 1e-3], default: [1e-3, 1e-2]}; `train.learning_rate` alone if unset.",
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=10**6)]], AfterValidator(check_distinct)] = Field(
        default=[0, 1, 2, 3, 4],
        min_length=1,
        description="Seeds of the repetitions; each has its own draws, new heads and order of training.",
    )
    equal_budget: bool = Field(
        True,
        description="Equal number of trainings: the best of as many draws or starts as IRD evaluates counts.",
    )
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig())

    @field_validator("learning_rates", mode="before")
    @classmethod
    def _rates(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name, rates in value.items():
                _check_rates(rates, name)
            counts = {name: len(rates) for name, rates in value.items()}
            if len(set(counts.values())) != 1:
                found = ", ".join(f"{count} of {name}" for name, count in counts.items()) or "none"
                raise InputError(f"found {found}", "as many learning rates for each method")
        elif value is not None:
            _check_rates(value)
        return value

    @field_validator("variants", mode="before")
    @classmethod
    def _methods_alone(cls, value: Any) -> Any:
        """Take a method alone for a list of one."""
        if not isinstance(value, dict):
            return value
        return {name: [changed] if isinstance(changed, str) else changed for name, changed in value.items()}

    @model_validator(mode="after")
    def _known(self) -> CompareConfig:
        for name, (method, *changes) in ((name, changed or ["nothing"]) for name, changed in self.variants.items()):
            key = f"variants.{name}"
            if name in KNOWN:
                raise InputError(f"found {name!r}, a method's name", "a new name", "variants")
            if method not in KNOWN:
                near = nearest(method, KNOWN)
                raise InputError(f"found {method!r}{near}", f"a method first: {', '.join(KNOWN)}", key)
            for change in changes:
                if not re.match(rf"({'|'.join(VARIED_SECTIONS)})\.[a-z_]+=", change):
                    keys = " or ".join(VARIED_SECTIONS)
                    example = f"key=value with a key of {keys}, such as fisher.samples=64"
                    raise InputError(f"found {change!r}", example, key)
        known = (*KNOWN, *self.variants)
        for name in self.methods or ():
            if name not in known:
                raise InputError(f"found {name!r}{nearest(name, known)}", f"one of {', '.join(known)}", "methods")
        if self.methods is not None and self.reference is not None and self.reference not in self.methods:
            methods = ", ".join(self.methods)
            raise InputError(f"found {self.reference!r}", f"one of methods: {methods}", "reference")
        self._check_rates_of(known)
        return self

    def _check_rates_of(self, known: tuple[str, ...]) -> None:
        """Check the keys of `learning_rates`, if it is a map."""
        if not isinstance(self.learning_rates, dict):
            return
        for name in self.learning_rates:
            if name not in (*known, DEFAULT):
                expected = f"{DEFAULT} or one of {', '.join(known)}"
                raise InputError(f"found {name!r}{nearest(name, (*known, DEFAULT))}", expected, "learning_rates")
        for name in self.asked:
            if self.rates_of(name) is None:
                raise InputError(f"found none for {name}", f"a list for it, or for {DEFAULT}", "learning_rates")

    @property
    def asked(self) -> list[str]:
        """Names of the methods to compare."""
        return self.methods or [*METHODS, *self.variants]

    def rates_of(self, name: str) -> list[float] | None:
        """The learning rates of a method, of the method that it varies, or the default; None if there are none."""
        if not isinstance(self.learning_rates, dict):
            return self.learning_rates
        names = [name, *self.variants.get(name, [])[:1]]
        names += PRESETS.get(names[-1], [])[:1]
        return next((self.learning_rates[one] for one in (*names, DEFAULT) if one in self.learning_rates), None)


def spelled_out(name: str, variants: dict[str, list[str]]) -> list[str]:
    """One of `METHODS`, or sparse_lora, that a method, preset or variant is, and what it changes."""
    method, *changes = variants.get(name, [name])
    kind, *preset = PRESETS.get(method, [method])
    return [kind, *preset, *changes]
