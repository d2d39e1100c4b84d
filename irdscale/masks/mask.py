"""Masks: the entries of the parameters that are trained, and rankings, whose prefixes are masks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from irdscale.config.schema import Scope
from irdscale.distributed.ranks import gather_texts
from irdscale.errors import InputError
from irdscale.masks.topk import Chosen, Slice, check_scores, largest, largest_of_checked, read
from irdscale.utils.files import read_tensors, read_versioned, write_folder, write_json

if TYPE_CHECKING:
    from irdscale.fisher import Fisher

FORMAT = "irdscale-mask"
VERSION = 1
# Relative to the largest squared gradient: smaller ones may be rounding errors of a gradient of 0 in float32.
ROUNDING = 1e-12


def index_dtype(numel: int) -> torch.dtype:
    """int32 if every flat index of a parameter fits, else int64."""
    return torch.int32 if numel <= 2**31 else torch.int64


@dataclass(frozen=True, eq=False)
class Mask:
    """The k entries to train.

    Attributes:
        indices: name -> sorted flat indices (int32 or int64 by the parameter's size), without parameters that have none
        shapes: name -> shape of every scored parameter
    """

    indices: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)

    def __eq__(self, other: object) -> bool:
        """Whether the entries are the same, whatever the order of names and the type of indices."""
        return self.hash == other.hash if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hash)

    @cached_property
    def k(self) -> int:
        """Number of entries."""
        return sum(len(index) for index in self.indices.values())

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits of SHA-256 over names and indices, equal for equal masks."""
        sha = hashlib.sha256()
        for name in sorted(self.indices):
            sha.update(name.encode() + b"\0")
            sha.update(self.indices[name].to(torch.int64).numpy().tobytes() + b"\0")
        return sha.hexdigest()[:16]

    def save(self, folder: Path | str) -> None:
        """Write mask.safetensors and mask.json into `folder`, atomically."""
        from safetensors.torch import save_file

        meta = {"format": FORMAT, "version": VERSION, "k": self.k, "hash": self.hash, "shapes": self.shapes}

        def fill(target: Path) -> None:
            save_file(self.indices, target / "mask.safetensors")
            write_json(target / "mask.json", meta)

        write_folder(folder, fill)

    @classmethod
    def load(cls, folder: Path | str) -> Mask:
        """Read what `save` wrote.

        Raises:
            InputError: there is no mask, or its files are damaged.
        """
        file, tensors = Path(folder) / "mask.json", Path(folder) / "mask.safetensors"
        meta = read_versioned(file, "mask", FORMAT, VERSION)
        indices = read_tensors(tensors, "mask")
        try:
            mask = cls(indices, {name: tuple(shape) for name, shape in meta["shapes"].items()})
            matches = mask.hash == meta["hash"] and mask.k == meta["k"] and set(indices) <= set(mask.shapes)
        except (KeyError, AttributeError, TypeError) as error:
            raise InputError(f"damaged mask: no valid {error}", where=file) from error
        if not matches:
            raise InputError("damaged mask: its contents do not match the stored hash", where=tensors)
        mask.check()
        return mask

    def check(self) -> None:
        """Check the indices against the shapes.

        Raises:
            InputError: an index is out of range, unsorted or repeated, or a shape is missing.
        """
        for name, index in self.indices.items():
            key = f"mask: {name}"
            if name not in self.shapes:
                raise InputError("found indices without a shape", key=key)
            numel = torch.Size(self.shapes[name]).numel()
            if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
                raise InputError(f"found {index.dtype} {tuple(index.shape)}", "flat integers", key)
            if len(index) and (int(index[0]) < 0 or int(index[-1]) >= numel or bool((index[1:] <= index[:-1]).any())):
                raise InputError("found invalid indices", f"sorted, distinct indices from 0 to {numel - 1}", key)


def top_k(fisher: Fisher, k: int, scope: Scope = "global") -> Mask:
    """The mask of the k entries with the largest Fisher information, exactly; ties go by the global flat index.

    The global flat index counts through the parameters in the order of `fisher.diagonal`. Collective if the Fisher
    information is sharded: every rank gets the full mask (see `irdscale.masks.topk`).

    Args:
        scope: `global` takes the largest entries of the model (FISH, arXiv 2111.09839, section 3), `layerwise` those of
            each parameter in proportion to its size (see `rank_entries`)

    Raises:
        InputError: k is not within 0 and the number of entries, or an entry is NaN, infinite or negative (named).
    """
    if scope == "layerwise":
        return rank_entries(fisher, k, scope).prefix(k)
    shapes = fisher.shapes
    _check_k(shapes, k)
    chosen = largest(fisher.slices(), k, fisher.layout == "sharded")
    return Mask({name: _stored(entries.index, shapes[name]) for name, entries in chosen.items()}, shapes)


def _check_k(shapes: dict[str, tuple[int, ...]], k: int) -> None:
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    if not 0 <= k <= total:
        raise InputError(f"found k = {k}", f"0 to {total}, the number of scored entries", "top_k")


def _stored(index: Tensor, shape: tuple[int, ...]) -> Tensor:
    return index.to(index_dtype(torch.Size(shape).numel()))


@dataclass(frozen=True)
class Ranking:
    """The entries of a mask from the largest score to the smallest, so that every smaller mask is a prefix.

    Attributes:
        parameter: int64 [k], each entry's parameter, as its position in `shapes`
        index: int64 [k], each entry's flat index in its parameter
        shapes: name -> shape of every scored parameter
    """

    parameter: Tensor
    index: Tensor
    shapes: dict[str, tuple[int, ...]]

    def prefix(self, k: int) -> Mask:
        """The mask of the k entries with the largest scores."""
        if not 0 <= k <= len(self.index):
            raise InputError(f"found k = {k}", f"0 to {len(self.index)}, the number of ranked entries")
        parameter, order = self.parameter[:k].sort(stable=True)
        counts = parameter.bincount(minlength=len(self.shapes)).tolist()
        parts = zip(self.shapes, self.index[:k][order].split(counts), strict=True)
        indices = {name: _stored(part.sort().values, self.shapes[name]) for name, part in parts if len(part)}
        return Mask(indices, self.shapes)


def rank_entries(fisher: Fisher, k: int, scope: Scope = "global") -> Ranking:
    """The k entries with the largest Fisher information in descending order, by the tie rule of `top_k`.

    Args:
        scope: `global`, or `layerwise`, where every prefix has a share of each parameter in proportion to its size: the
            r-th largest of n entries has position (2 r - 1) / 2n, by Webster's rule. Scores below `ROUNDING` times the
            largest count as 0, so that the entries of a parameter without gradient (a key's bias) do not depend on the
            number of ranks.
    """
    return ranking_of([candidates_of(fisher, k, scope, fisher.shapes)], k, scope, fisher.shapes)


@dataclass(frozen=True)
class Candidates:
    """Entries of a group of parameters that may be among the first k of all groups.

    The scores of one group after another need less memory than all scores together.

    Attributes:
        chosen: name -> entries of that parameter, sorted by flat index
        largest: largest score of the group; 0 unless ranked layerwise
    """

    chosen: dict[str, Chosen]
    largest: float

    def tensors(self) -> dict[str, Tensor]:
        """The candidates as tensors by name, for a file."""
        found = {"largest": torch.tensor(self.largest, dtype=torch.float64)}
        for name, entries in self.chosen.items():
            found |= {f"index.{name}": entries.index, f"scores.{name}": entries.scores.contiguous()}
        return found

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Candidates:
        """The candidates that `tensors` returned."""
        names = [key.removeprefix("index.") for key in tensors if key.startswith("index.")]
        chosen = {name: Chosen(tensors[f"index.{name}"], tensors[f"scores.{name}"]) for name in names}
        return cls(chosen, float(tensors["largest"]))


def candidates_of(fisher: Fisher, k: int, scope: Scope, shapes: dict[str, tuple[int, ...]]) -> Candidates:
    """The candidates of one group; collective if its scores are sharded.

    Args:
        fisher: scores of the group's parameters
        shapes: name -> shape of every scored parameter of all groups

    Raises:
        InputError: k is not within 0 and the number of entries, or a score is NaN, infinite or negative (named).
    """
    _check_k(shapes, k)
    shared, pieces = fisher.layout == "sharded", fisher.slices()
    if scope == "global":
        own = sum(torch.Size(shape).numel() for shape in fisher.shapes.values())
        return Candidates(largest(pieces, min(k, own), shared), 0.0)
    check_scores(pieces, shared)
    counts, chosen = counts_within(k, shapes), dict[str, Chosen]()
    for name, piece in pieces.items():
        chosen |= largest_of_checked({name: piece}, counts[name], shared)
    return Candidates(chosen, largest_score(pieces, shared))


def ranking_of(groups: Sequence[Candidates], k: int, scope: Scope, shapes: dict[str, tuple[int, ...]]) -> Ranking:
    """The first k entries of all groups in descending order, as `rank_entries` ranks all scores together."""
    found = {name: entries for group in groups for name, entries in group.chosen.items()}
    if scope == "layerwise":
        floor = ROUNDING * max((group.largest for group in groups), default=0.0)
        found = {name: _cleared(entries, floor) for name, entries in found.items()}
    keys, parameters, indices = [], [], []
    for place, (name, shape) in enumerate(shapes.items()):
        if name in found:
            entries, numel = found[name], torch.Size(shape).numel()
            keys.append(-positions_of(entries.scores, numel) if scope == "layerwise" else entries.scores)
            parameters.append(torch.full_like(entries.index, place))
            indices.append(entries.index)
    if not keys:
        none = torch.zeros(0, dtype=torch.int64)
        return Ranking(none, none, shapes)
    order = torch.cat(keys).sort(descending=True, stable=True).indices[:k]
    return Ranking(torch.cat(parameters)[order], torch.cat(indices)[order], shapes)


def _cleared(entries: Chosen, floor: float) -> Chosen:
    """As many entries of the parameter as given, with those below `floor` replaced by its first ones, of score 0."""
    kept = entries.scores >= floor
    index, scores, missing = entries.index[kept], entries.scores[kept], int((~kept).sum())
    if not missing:
        return entries
    first = torch.arange(len(entries.index))
    fill = first[~torch.isin(first, index)][:missing]
    index, order = torch.cat([index, fill]).sort()
    return Chosen(index, torch.cat([scores, scores.new_zeros(missing)])[order])


def counts_within(k: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """name -> most entries of that parameter among the first k by position."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    # Of n entries, floor(n x + 1/2) have positions up to x: more than k of all parameters together at this x.
    last = (k + len(sizes)) / max(1, sum(sizes.values()))
    return {name: min(size, int(size * last + 0.5)) for name, size in sizes.items()}


def largest_score(pieces: dict[str, Slice], shared: bool) -> float:
    """The largest score of all slices, 0 if there is none; collective with `shared`."""
    own = max(read([p.scores.max() for p in pieces.values() if p.scores.numel()], torch.float64).tolist(), default=0.0)
    return max(map(float, gather_texts(repr(own)))) if shared else own


def positions_of(scores: Tensor, numel: int) -> Tensor:
    """(2 r - 1) / 2n for the r-th largest of a parameter's n entries, of which these are the largest."""
    order = scores.sort(descending=True, stable=True).indices
    positions = torch.empty(len(scores), dtype=torch.float64)
    positions[order] = (2 * torch.arange(len(scores), dtype=torch.float64) + 1) / (2 * numel)
    return positions


def density(mask: Mask) -> dict[str, Any]:
    """name -> fraction of the parameter's entries in the mask, for every scored parameter."""
    return {
        name: len(mask.indices.get(name, ())) / max(1, torch.Size(shape).numel()) for name, shape in mask.shapes.items()
    }
