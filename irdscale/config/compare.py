"""The section `compare` of a configuration."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from irdscale.config.section import Section, check_distinct
from irdscale.errors import InputError
from irdscale.utils.suggestions import nearest

# What `irdscale compare` can compare; irdscale/compare/methods.py says what each one is.
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
    "activation",
    "gem",
    "gallop",
    "lora",
    "bitfit",
    "linear_probe",
    "full",
)
VARIED_SECTIONS = ("fisher", "search")


class CompareConfig(Section):
    methods: Annotated[list[str] | None, AfterValidator(check_distinct)] = Field(
        None, min_length=1, description="Methods, and names of `variants`; all methods that suit the model if unset."
    )
    variants: dict[str, list[str]] = Field(
        default_factory=dict,
        description="Variants: a name, and a method with what it changes, such as [ird, search.max_rounds=2].",
    )
    reference: str | None = Field(None, description="Method that all others are compared with; the first if unset.")
    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]] | None, AfterValidator(check_distinct)] = Field(
        None, min_length=1, description="Learning rates that every method tries; `train.learning_rate` alone if unset."
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
    lora_rank: int = Field(8, ge=1, description="Rank of the LoRA matrices, in every linear layer but the head.")

    @model_validator(mode="after")
    def _known(self) -> CompareConfig:
        for name, (method, *changes) in ((name, changed or ["nothing"]) for name, changed in self.variants.items()):
            key = f"variants.{name}"
            if name in METHODS:
                raise InputError(f"found {name!r}, a method's name", "a new name", "variants")
            if method not in METHODS:
                near = nearest(method, METHODS)
                raise InputError(f"found {method!r}{near}", f"a method first: {', '.join(METHODS)}", key)
            for change in changes:
                if not re.match(rf"({'|'.join(VARIED_SECTIONS)})\.[a-z_]+=", change):
                    keys = " or ".join(VARIED_SECTIONS)
                    example = f"key=value with a key of {keys}, such as fisher.samples=64"
                    raise InputError(f"found {change!r}", example, key)
        known = (*METHODS, *self.variants)
        for name in self.methods or ():
            if name not in known:
                raise InputError(f"found {name!r}{nearest(name, known)}", f"one of {', '.join(known)}", "methods")
        if self.methods is not None and self.reference is not None and self.reference not in self.methods:
            methods = ", ".join(self.methods)
            raise InputError(f"found {self.reference!r}", f"one of methods: {methods}", "reference")
        return self
