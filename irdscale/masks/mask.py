"""Masks: which entries of which parameters are trained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from irdscale.config.schema import Scope
from irdscale.distributed.ranks import all_reduce_sum, gather_texts
from irdscale.errors import InputError
from irdscale.masks.topk import Chosen, Slice, check_scores, largest, largest_of_checked, read
from irdscale.utils.files import read_tensors, read_versioned, write_folder, write_json

if TYPE_CHECKING:
    from irdscale.fisher import Fisher

FORMAT = "irdscale-mask"
VERSION = 1
# Of squared gradients: a millionth of the largest gradient, above what float32 leaves of one that is 0.
ROUNDING = 1e-12


def index_dtype(numel: int) -> torch.dtype:
    """int32 where every flat index of a parameter fits, int64 otherwise."""
    return torch.int32 if numel <= 2**31 else torch.int64


@dataclass(frozen=True, eq=False)
class Mask:
    """The k entries to train.

    Attributes:
        indices: name -> sorted flat indices (int32 or int64, by the parameter's size), only where there are any.
        shapes: name -> shape, of every parameter that was scored.
    """

    indices: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)

    def __eq__(self, other: object) -> bool:
        """Whether the entries are the same, in whatever order and type their names and indices are kept."""
        return self.hash == other.hash if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hash)

    @cached_property
    def k(self) -> int:
        """Number of entries."""
        return sum(len(index) for index in self.indices.values())

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits of SHA-256 over names and indices: equal for equal masks."""
        sha = hashlib.sha256()
        for name in sorted(self.indices):
            sha.update(name.encode() + b"\0")
            sha.update(self.indices[name].to(torch.int64).numpy().tobytes() + b"\0")
        return sha.hexdigest()[:16]

    def save(self, folder: Path | str) -> None:
        """Write mask.safetensors and mask.json into `folder`, atomically."""
        from safetensors.torch import save_file

        def fill(target: Path) -> None:
            save_file(self.indices, target / "mask.safetensors")
            shapes = {name: list(shape) for name, shape in self.shapes.items()}
            write_json(
                target / "mask.json",
                {"format": FORMAT, "version": VERSION, "k": self.k, "hash": self.hash, "shapes": shapes},
            )

        write_folder(folder, fill)

    @classmethod
    def load(cls, folder: Path | str) -> Mask:
        """Read what `save` wrote.

        Raises:
            InputError: no mask there, or its files are damaged.
        """
        folder = Path(folder)
        meta = read_versioned(folder / "mask.json", "mask", FORMAT, VERSION)
        indices = read_tensors(folder / "mask.safetensors", "mask")
        try:
            mask = cls(indices, {name: tuple(shape) for name, shape in meta["shapes"].items()})
            whole = mask.hash == meta["hash"] and mask.k == meta["k"] and set(indices) <= set(mask.shapes)
        except (KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{folder / 'mask.json'}: damaged mask: no valid {error}") from error
        if not whole:
            raise InputError(f"{folder / 'mask.safetensors'}: damaged mask: its contents do not match the stored hash")
        mask.check()
        return mask

    def check(self) -> None:
        """Refuse indices that no parameter of the stated shapes can have.

        Raises:
            InputError: an index is out of range, unsorted or repeated, or a shape is missing.
        """
        for name, index in self.indices.items():
            if name not in self.shapes:
                raise InputError(f"mask: {name}: found indices without a shape")
            numel = torch.Size(self.shapes[name]).numel()
            if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
                raise InputError(f"mask: {name}: found {index.dtype} {tuple(index.shape)}; expected flat integers")
            if len(index) and (int(index[0]) < 0 or int(index[-1]) >= numel or bool((index[1:] <= index[:-1]).any())):
                raise InputError(f"mask: {name}: expected sorted, distinct indices from 0 to {numel - 1}")


def top_k(fisher: Fisher, k: int, scope: Scope = "global") -> Mask:
    """The mask of the k entries with the largest Fisher information, exactly; ties go by the global flat index.

    The global flat index counts through the parameters in the order of `fisher.diagonal`. Collective where the Fisher
    information is sharded: every rank gets the whole mask (see `irdscale.masks.topk`).

    Args:
        scope: `global`, the largest of the whole model (FISH, arXiv 2111.09839, section 3), or `layerwise`, of each
            parameter in proportion to its size (see `rank_entries`).

    Raises:
        InputError: k is not within 0 and the number of entries, or an entry is NaN, infinite or negative (named).
    """
    if scope == "layerwise":
        return rank_entries(fisher, k, scope).prefix(k)
    chosen, shapes = _largest(fisher, k)
    return Mask({name: _stored(entries.index, shapes[name]) for name, entries in chosen.items()}, shapes)


def _largest(fisher: Fisher, k: int) -> tuple[dict[str, Chosen], dict[str, tuple[int, ...]]]:
    _check_k(k, sum(torch.Size(shape).numel() for shape in fisher.shapes.values()))
    return largest(fisher.slices(), k, shared=fisher.layout == "sharded"), fisher.shapes


def _check_k(k: int, total: int) -> None:
    if not 0 <= k <= total:
        raise InputError(f"top_k: found k = {k}; expected 0 to {total}, the number of scored entries")


def _stored(index: Tensor, shape: tuple[int, ...]) -> Tensor:
    return index.to(index_dtype(torch.Size(shape).numel()))


@dataclass(frozen=True)
class Ranking:
    """The entries of a mask from the largest score to the smallest, so that every smaller mask is a prefix.

    Attributes:
        parameter: int64 [k], which parameter, counting through `shapes`.
        index: int64 [k], flat index in that parameter.
        shapes: name -> shape of every scored parameter.
    """

    parameter: Tensor
    index: Tensor
    shapes: dict[str, tuple[int, ...]]

    def prefix(self, k: int) -> Mask:
        """The mask of the k entries with the largest scores."""
        if not 0 <= k <= len(self.index):
            raise InputError(f"found k = {k}; expected 0 to {len(self.index)}, the ranked entries")
        parameter, index = self.parameter[:k], self.index[:k]
        indices: dict[str, Tensor] = {}
        for place, (name, shape) in enumerate(self.shapes.items()):
            inside = index[parameter == place].sort().values
            if len(inside):
                indices[name] = _stored(inside, shape)
        return Mask(indices, self.shapes)


def rank_entries(fisher: Fisher, k: int, scope: Scope = "global") -> Ranking:
    """The k entries with the largest Fisher information in descending order, by the tie rule of `top_k`.

    Args:
        scope: with `layerwise` every parameter has its share of each prefix, by its number of entries: the r-th largest
            of n stands at (2 r - 1) / 2n, as seats are dealt out by Webster's rule. Scores below `ROUNDING` times the
            largest of all count as 0: a parameter without any gradient, as a key's bias, gets the same entries however
            many ranks there are.
    """
    chosen, shapes = _largest(fisher, k) if scope == "global" else _largest_of_each(fisher, k)
    if not chosen:
        none = torch.zeros(0, dtype=torch.int64)
        return Ranking(none, none, shapes)
    places = {name: place for place, name in enumerate(shapes)}
    if scope == "global":
        keys = [entries.scores for entries in chosen.values()]
    else:
        keys = [-_standing(entries.scores, torch.Size(shapes[name]).numel()) for name, entries in chosen.items()]
    order = torch.cat(keys).sort(descending=True, stable=True).indices[:k]
    parameter = torch.cat([torch.full_like(entries.index, places[name]) for name, entries in chosen.items()])
    return Ranking(parameter[order], torch.cat([entries.index for entries in chosen.values()])[order], shapes)


def _largest_of_each(fisher: Fisher, k: int) -> tuple[dict[str, Chosen], dict[str, tuple[int, ...]]]:
    """Of every parameter as many of its largest entries as the k first by standing can hold."""
    sizes = {name: torch.Size(shape).numel() for name, shape in fisher.shapes.items()}
    _check_k(k, sum(sizes.values()))
    # Of n entries n x + 1/2, rounded down, stand at x or before: of all parameters together more than k.
    standing = (k + len(sizes)) / max(1, sum(sizes.values()))
    shared, pieces = fisher.layout == "sharded", fisher.slices()
    check_scores(pieces, shared)
    floor = ROUNDING * _largest_score(pieces, shared)
    real_P = read([(piece.scores >= floor).sum() for piece in pieces.values()], torch.int64)
    if shared:
        all_reduce_sum([real_P])
    chosen: dict[str, Chosen] = {}
    for (name, piece), real in zip(pieces.items(), real_P.tolist(), strict=True):
        count = min(sizes[name], int(sizes[name] * standing + 0.5)) if k else 0
        # A copy of the scores is made only where rounding errors would be chosen among.
        few = real < count
        cleared = Slice(piece.start, piece.scores.where(piece.scores >= floor, 0)) if few else piece
        chosen |= largest_of_checked({name: cleared}, count, shared)
    return chosen, fisher.shapes


def _largest_score(pieces: dict[str, Slice], shared: bool) -> float:
    own = max(read([p.scores.max() for p in pieces.values() if p.scores.numel()], torch.float64).tolist(), default=0.0)
    return max(map(float, gather_texts(repr(own)))) if shared else own


def _standing(scores: Tensor, numel: int) -> Tensor:
    """(2 r - 1) / 2n for the r-th largest of the n scores, of which these are some of the largest."""
    order = scores.sort(descending=True, stable=True).indices
    standing = torch.empty(len(scores), dtype=torch.float64)
    standing[order] = (2 * torch.arange(len(scores), dtype=torch.float64) + 1) / (2 * numel)
    return standing


def density(mask: Mask) -> dict[str, Any]:
    """name -> share of the parameter's entries that the mask trains, for every scored parameter."""
    return {
        name: len(mask.indices.get(name, ())) / max(1, torch.Size(shape).numel()) for name, shape in mask.shapes.items()
    }
