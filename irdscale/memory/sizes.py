"""Data classes and constants of memory estimates. This module does not import torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Literal

from irdscale.utils.formats import GIB

# What a training step trains. limit: nothing (forward pass and input gradients). concentrated, scattered: a mask with
# entries in few rows and columns, or in all. lora: LoRA matrices on all linear layers. full: all weights, by AdamW.
StepKind = Literal["limit", "concentrated", "scattered", "lora", "full"]
# Share of a matrix's columns with mask entries, over the root of the mask's ratio. Measured on Fisher masks of
# SmolLM2-135M (32 x 128 tokens of English, scope `global`): 0.16, 0.28, 0.44, 0.67 at 0.2, 0.5, 1, 2 %.
_COLUMNS = 4.0


def columns_held(ratio: float, scattered: bool) -> float:
    """Share of a matrix's columns with entries of a mask that has this share of all entries."""
    return 1.0 if scattered else min(1.0, _COLUMNS * ratio**0.5)


@dataclass(frozen=True)
class Shapes:
    """A model's sizes, and its scored and trained parameters.

    Attributes:
        parameters: entries of all parameters, tied ones once.
        item: bytes per entry.
        scored: name -> shape of every parameter that a mask may hold entries of.
        dense: entries trained outside the mask.
        products: [out, in] of every matrix that multiplies tokens, including a language model's head.
        largest: entries of the largest parameter.
        layer: entries of the largest layer.
        hidden: width of the layers.
        layers: number of equal layers.
        attention: heads x width of a head; 0 without attention.
        causal: whether attention is causal.
        positions: largest number of tokens; None for no limit.
        quantized: bytes of all parameters if some are quantised; None if all have `item` bytes per entry.
    """

    parameters: int
    item: int
    scored: dict[str, tuple[int, ...]]
    dense: int
    products: list[tuple[int, int]]
    largest: int
    layer: int
    hidden: int
    layers: int
    attention: int
    causal: bool
    positions: int | None
    quantized: int | None = None

    @property
    def base(self) -> int:
        """Bytes of all parameters."""
        return self.parameters * self.item if self.quantized is None else self.quantized

    @property
    def scored_sizes(self) -> list[int]:
        """Entries of each scored parameter."""
        return [prod(shape) for shape in self.scored.values()]


@dataclass(frozen=True)
class PassBytes:
    """Bytes that one pass allocates.

    Attributes:
        saved: held at the end of the forward pass, for the backward pass.
        peak: largest total at any moment of the pass.
    """

    saved: int
    peak: int

    def __sub__(self, other: PassBytes) -> PassBytes:
        return PassBytes(self.saved - other.saved, self.peak - other.peak)

    def __add__(self, other: PassBytes) -> PassBytes:
        return PassBytes(self.saved + other.saved, self.peak + other.peak)

    def __mul__(self, times: int) -> PassBytes:
        return PassBytes(times * self.saved, times * self.peak)


@dataclass(frozen=True)
class PassSetting:
    """How a pass runs.

    Attributes:
        batch, tokens: samples, each padded to this many tokens.
        ratio: trained entries over scored entries.
        checkpointing: gradient checkpointing.
        language: whether the loss is a language model's.
        memory: bytes of the GPU; None for a CPU.
        scattered: whether trained entries are in all rows and columns.
    """

    batch: int
    tokens: int
    ratio: float
    checkpointing: bool
    language: bool
    memory: int | None
    scattered: bool

    @property
    def on_gpu(self) -> bool:
        """Whether GPU kernels are used, which read bfloat16 directly and form no per-sample gradient."""
        return self.memory is not None


@dataclass(frozen=True)
class Items:
    """Bytes of one rank at the peak of a phase, by purpose."""

    weights: int = 0
    activations: int = 0
    fisher: int = 0
    values_and_moments: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """Sum of all items."""
        return sum(asdict(self).values())

    def gib(self) -> dict[str, float]:
        """Each item and the total, in GiB."""
        return {name: round(held / GIB, 4) for name, held in (*asdict(self).items(), ("total", self.total))}
