"""The exact k largest of many non-negative numbers, in one process or in slices over the ranks.

Non-negative floats have the order of their bits, so the k-th largest value is found by counting 11 bits at a time.
Ranks exchange counts, not scores. Ties go by the global flat index: by parameter, then by entry of the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from irdscale.distributed.ranks import all_reduce_sum, failing_together, gather_flat, rank_and_world
from irdscale.errors import InputError

DIGITS = 11
# Entries that are counted together, so that temporary tensors stay in the CPU's cache.
CHUNK = 2**20
# On a GPU each count waits for the device, so there are fewer.
GPU_CHUNK = 2**26


@dataclass(frozen=True)
class Slice:
    """A run of one parameter's entries.

    Attributes:
        start: flat index of the first entry
        scores: non-negative scores [n]
    """

    start: int
    scores: Tensor


@dataclass(frozen=True)
class Chosen:
    """Entries of one parameter: sorted flat indices (int64 [n], on the CPU) and their scores [n]."""

    index: Tensor
    scores: Tensor


def largest(slices: dict[str, Slice], k: int, shared: bool = False) -> dict[str, Chosen]:
    """The k largest entries by parameter, without parameters that have none.

    Args:
        slices: this process's entries of each parameter: all of them, or with `shared` a slice
        shared: collective; every rank passes the same names, with consecutive slices by rank, and gets all entries

    Raises:
        InputError: an entry is NaN, infinite or negative; names the parameter.
    """
    check_scores(slices, shared)
    return largest_of_checked(slices, k, shared)


def largest_of_checked(slices: dict[str, Slice], k: int, shared: bool = False) -> dict[str, Chosen]:
    """`largest` without `check_scores`."""
    if k == 0:
        return {}
    bits = {name: ordered_bits(s.scores) for name, s in slices.items()}
    threshold, ties = _kth_largest(list(bits.values()), k, shared)
    equal_P = read([_count_equal(flat, threshold) for flat in bits.values()], torch.int64)
    quota_P = _own_ties(equal_P, ties, shared)
    own = {name: _above(slices[name], bits[name], threshold, int(quota_P[i])) for i, name in enumerate(slices)}
    return _everyones(own) if shared else {name: chosen for name, chosen in own.items() if len(chosen.index)}


def check_scores(slices: dict[str, Slice], shared: bool = False) -> None:
    """Check that scores are finite and non-negative; with `shared` all ranks fail together.

    Raises:
        InputError: names the parameter.
    """
    with failing_together() if shared else nullcontext():
        held = {name: piece.scores.detach().aminmax() for name, piece in slices.items() if piece.scores.numel()}
        ends = read([end for both in held.values() for end in both], torch.float64).view(-1, 2).tolist()
        for name, (low, high) in zip(held, ends, strict=True):
            if not (low >= 0 and high < float("inf")):
                fault = "NaN" if high != high or low != low else "an infinite" if high == float("inf") else "a negative"
                raise InputError(f"found {fault} Fisher information", "finite numbers of at least 0", name)


def read(numbers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Scalar tensors on any devices as one tensor on the CPU; waits once per device."""
    found = torch.zeros(len(numbers), dtype=dtype)
    for device in dict.fromkeys(number.device for number in numbers):
        places = [i for i, number in enumerate(numbers) if number.device == device]
        found[places] = torch.stack([numbers[i].to(dtype) for i in places]).cpu()
    return found


def ordered_bits(scores: Tensor) -> Tensor:
    """Non-negative floats as integers of the same order, flat."""
    flat = scores.detach().reshape(-1)
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    integers = flat.view(torch.int32 if flat.dtype == torch.float32 else torch.int64)
    # -0.0 has only the sign bit, and is the only negative integer here. The search for it is cheaper than a copy.
    return integers if not len(integers) or int(integers.min()) >= 0 else integers.clamp_min(0)


def _parts(flat: Tensor) -> tuple[Tensor, ...]:
    return flat.split(GPU_CHUNK if flat.is_cuda else CHUNK)


def _kth_largest(flats: list[Tensor], k: int, shared: bool) -> tuple[int, int]:
    """The bits of the k-th largest value, and the number of entries equal to it among the k largest."""
    width = 31 if all(f.dtype == torch.int32 for f in flats) else 63
    prefix, known, left = 0, 0, k
    while known < width:
        digits = min(DIGITS, width - known)
        shift = width - known - digits
        counts = torch.zeros(2**digits, dtype=torch.int64)
        for flat in flats:
            for part in _parts(flat):
                inside = part if known == 0 else part[(part >> (shift + digits)) == prefix]
                if len(inside):
                    digit = (inside >> shift) & (2**digits - 1)
                    counts += torch.bincount(digit, minlength=2**digits).cpu()
        if shared:
            all_reduce_sum([counts])
        above = counts.flip(0).cumsum(0).flip(0) - counts
        bucket = int(((above < left) & (above + counts >= left)).nonzero()[0])
        left -= int(above[bucket])
        prefix, known = (prefix << digits) | bucket, known + digits
    return prefix, left


def _count_equal(flat: Tensor, threshold: int) -> Tensor:
    return torch.stack([(part == threshold).sum() for part in _parts(flat)]).sum()


def _own_ties(equal_P: Tensor, ties: int, shared: bool) -> Tensor:
    """Number of this process's entries at the threshold that are chosen, for each parameter."""
    rank, world = rank_and_world() if shared else (0, 1)
    equal_PR = torch.zeros(len(equal_P), world, dtype=torch.int64)
    equal_PR[:, rank] = equal_P
    if shared:
        all_reduce_sum([equal_PR])
    before_PR = (equal_PR.reshape(-1).cumsum(0) - equal_PR.reshape(-1)).view_as(equal_PR)
    return (ties - before_PR[:, rank]).clamp_min(0).minimum(equal_P)


def _above(piece: Slice, flat: Tensor, threshold: int, ties: int) -> Chosen:
    """The entries of a slice above the threshold, and the first `ties` at it."""
    scores, found, first = piece.scores.detach().reshape(-1), [], 0
    for part in _parts(flat):
        chosen = part > threshold
        if ties:
            equal = (part == threshold).nonzero().flatten()[:ties]
            ties -= len(equal)
            chosen[equal] = True
        inside = chosen.nonzero().flatten()
        if len(inside):
            found.append(inside + first)
        first += len(part)
    index = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=scores.device)
    return Chosen((index + piece.start).cpu(), scores[index].cpu())


def _everyones(own: dict[str, Chosen]) -> dict[str, Chosen]:
    rank, world = rank_and_world()
    counts_RP = torch.zeros(world, len(own), dtype=torch.int64)
    counts_RP[rank] = torch.tensor([len(chosen.index) for chosen in own.values()])
    all_reduce_sum([counts_RP])
    return {
        name: Chosen(gather_flat(chosen.index, counts), gather_flat(chosen.scores, counts))
        for (name, chosen), counts in zip(own.items(), counts_RP.t().tolist(), strict=True)
        if sum(counts)
    }
