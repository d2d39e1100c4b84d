"""The masks of a search compared: the entries that they share, and the layers that hold them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from irdscale.masks.mask import Mask
from irdscale.utils.formats import percent

LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
OTHER = "other"


@dataclass(frozen=True)
class Overlap:
    """The shared entries of the masks of all sample sets at the largest p.

    Attributes:
        params: p.
        names: names of the masks, most samples first.
        shares: share of p that the masks of row and column share.
        chance: share of p that two random masks share.
    """

    params: int
    names: list[str]
    shares: list[list[float]]
    chance: float


@dataclass(frozen=True)
class Layer:
    """One numbered layer, or all parameters outside the layers.

    Attributes:
        shares: share of each mask's entries that lie here, largest sample set first.
        kept: share of the smallest set's entries here that the largest set's mask has too; None without entries.
        chance: `kept` of random entries.
    """

    name: str
    shares: list[float]
    kept: float | None
    chance: float

    @property
    def gain(self) -> float:
        """The growth of the share from the largest to the smallest sample set."""
        return self.shares[-1] - self.shares[0]


def common_entries(a: Mask, b: Mask) -> dict[str, int]:
    """Name -> number of entries in both masks, for parameters in both."""
    shared = (name for name in a.indices if name in b.indices)
    return {n: int(torch.isin(a.indices[n], b.indices[n], assume_unique=True).sum()) for n in shared}


def layer_of(name: str) -> str:
    """The number of a parameter's layer, or `OTHER`."""
    found = LAYER.match(name)
    return found[2] if found else OTHER


def scored_parameters(mask: Mask) -> int:
    """Number of the parameters that the mask was chosen from."""
    return sum(torch.Size(shape).numel() for shape in mask.shapes.values())


def most_held(masks: Sequence[Mask]) -> tuple[str, float, float] | None:
    """The parameter with the most entries of several masks, its share of these, and its share of all scored parameters.

    None if the masks are empty.
    """
    held: Counter[str] = Counter()
    for mask in masks:
        held.update({name: len(index) for name, index in mask.indices.items()})
    if not held.total():
        return None
    name, count = held.most_common(1)[0]
    return name, count / held.total(), torch.Size(masks[0].shapes[name]).numel() / scored_parameters(masks[0])


def concentration(mask: Mask) -> str | None:
    """A sentence on the parameter that holds most of a mask's entries beyond its size; None if none does."""
    held = most_held([mask])
    if held is None or held[1] <= max(0.5, 2 * held[2]):
        return None
    name, share, size = held
    return (
        f"{percent(share)} of the mask's entries are in {name}, which has {percent(size)} of the scored parameters: "
        f"fisher.exclude leaves it out, fisher.scope=layerwise gives every parameter entries in proportion to its size."
    )


def overlaps(masks: Mapping[str, Mask], p: int) -> Overlap:
    """The shared entries of every two of the named masks, of p entries each."""
    names, listed = list(masks), list(masks.values())
    shares = [[1.0] * len(listed) for _ in listed]
    for i, j in itertools.combinations(range(len(listed)), 2):
        shares[i][j] = shares[j][i] = sum(common_entries(listed[i], listed[j]).values()) / p
    return Overlap(p, names, shares, p / scored_parameters(listed[0]))


def by_layer(masks: Sequence[Mask]) -> list[Layer]:
    """The layers that hold the entries of several masks of one model, in order, with `OTHER` last."""
    held = [_sums({name: len(index) for name, index in mask.indices.items()}) for mask in masks]
    largest, smallest = masks[0], masks[-1]
    sizes = _sums({name: torch.Size(shape).numel() for name, shape in largest.shapes.items()})
    common = _sums(common_entries(smallest, largest))
    names = sorted(sizes, key=lambda name: (name == OTHER, int(name) if name != OTHER else 0))
    return [
        Layer(
            name,
            [one.get(name, 0) / mask.k for one, mask in zip(held, masks, strict=True)],
            common.get(name, 0) / held[-1][name] if held[-1].get(name) else None,
            held[0].get(name, 0) / sizes[name],
        )
        for name in names
    ]


def _sums(counts: Mapping[str, int]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for name, count in counts.items():
        layer = layer_of(name)
        totals[layer] = totals.get(layer, 0) + count
    return totals


def describe_overlap(overlap: Overlap, sizes: list[int]) -> str:
    """A sentence on the overlap of the masks of sample sets of these sizes."""
    neighbours = [overlap.shares[i][i + 1] for i in range(len(sizes) - 1)]
    low, high = percent(min(neighbours)), percent(max(neighbours))
    span = low if low == high else f"{low} to {high}"
    text = f"Of their {overlap.params:,} entries, the masks of neighbouring sample sets share {span}"
    if len(sizes) > 2:
        text += f", those of {sizes[0]:,} and {sizes[-1]:,} samples {percent(overlap.shares[0][len(sizes) - 1])}"
    return f"{text}; random masks would share {percent(overlap.chance)}. The smaller sets are subsets of the larger."
