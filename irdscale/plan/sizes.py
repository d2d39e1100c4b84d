"""Plain numbers that the parts of a plan hand each other. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

GIB = 2**30


@dataclass(frozen=True)
class Shapes:
    """What the arithmetic needs to know of a model and of what is trained of it.

    Attributes:
        parameters: all entries, tied ones once.
        item: bytes of one.
        scored: name -> shape of every parameter that a mask may hold entries of.
        dense: entries trained outside the mask.
        products: [out, in] of every matrix that tokens are multiplied by, a language model's head included.
        largest: entries of the largest parameter.
        layer: entries of the largest layer.
        hidden: width of the layers.
        layers: of the stack of equal layers.
        attention: heads x width of a head; 0 where there is none.
        causal: whether a token attends to those before it only.
        positions: tokens that the model takes; None for any number.
        quantized: bytes of all parameters where some are quantised; None where all are of `item` bytes an entry.
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
class Traced:
    """Bytes of a pass beyond what was there before it.

    Attributes:
        saved: held at the end of the forward pass, for the backward pass.
        peak: the most at any moment of the pass.
    """

    saved: int
    peak: int

    def __sub__(self, other: Traced) -> Traced:
        return Traced(self.saved - other.saved, self.peak - other.peak)

    def __add__(self, other: Traced) -> Traced:
        return Traced(self.saved + other.saved, self.peak + other.peak)

    def __mul__(self, times: int) -> Traced:
        return Traced(times * self.saved, times * self.peak)


@dataclass(frozen=True)
class Setting:
    """How a pass is run.

    Attributes:
        batch, tokens: samples, and tokens of the longest, to which the others are padded.
        ratio: of the trained entries to all that may be.
        checkpointing: layers keep their inputs alone.
        language: the loss is of tokens, by the model's head.
        memory: bytes of the GPU; None for a CPU.
        scattered: the trained entries lie in all rows and columns.
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
        """Whether kernels take bfloat16 as it is, and form no sample's gradient."""
        return self.memory is not None


@dataclass(frozen=True)
class Items:
    """Bytes of one rank at the peak of a phase, by what they are for."""

    weights: int = 0
    activations: int = 0
    fisher: int = 0
    values_and_moments: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.activations + self.fisher + self.values_and_moments + self.buffers

    def gib(self) -> dict[str, float]:
        """Each item and the total, in GiB."""
        names = ("weights", "activations", "fisher", "values_and_moments", "buffers", "total")
        return {name: round(getattr(self, name) / GIB, 4) for name in names}
