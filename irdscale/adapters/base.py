"""The hash of a sparse model's frozen base, cached until a write to the base is noticed.

A caller that reuses one base model, and compares its weights after each use, vouches for its hashes: they outlive the
sparse model, and adapters are saved with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from irdscale.sparse.model import VOUCHED, base_hash, is_sparse, sparse_state


def known_hash(model: nn.Module, without: Iterable[str]) -> str:
    """`base_hash(model, without)`, computed again only if the base may have changed since the last time.

    A replaced tensor (another dtype or device) and a write that autograd counts are noticed; a write through `.data`
    is not.
    """
    state, left_out = sparse_state(model), frozenset(without)
    stamp = _stamp(model, left_out)
    known = state.known_bases.get(left_out)
    if known is None or known[0] != stamp:
        known = state.known_bases[left_out] = (stamp, base_hash(model, left_out))
    return known[1]


def vouch(model: nn.Module, hashes: Mapping[frozenset[str], str]) -> None:
    """Store the hashes of a plain model's base for its later use as a sparse model.

    Args:
        hashes: names of the excluded parameters -> `base_hash` without them.
    """
    vars(model)[VOUCHED] = {left_out: (_stamp(model, left_out), known) for left_out, known in hashes.items()}


def is_vouched(model: nn.Module) -> bool:
    """Whether `vouch` was called for the model."""
    return VOUCHED in vars(model)


def known_hashes(model: nn.Module) -> dict[frozenset[str], str]:
    """The cached hashes of a sparse model's base that are still valid, by the excluded parameters."""
    known = sparse_state(model).known_bases.items()
    return {left_out: found for left_out, (stamp, found) in known if stamp == _stamp(model, left_out)}


def _stamp(model: nn.Module, left_out: frozenset[str]) -> tuple[Any, ...]:
    """Each frozen parameter's address, type, device, and autograd's count of writes to it."""
    values = {id(entries.values) for entries in sparse_state(model).patched} if is_sparse(model) else set()
    return tuple(
        (name, p.data_ptr(), p.dtype, p.device, p._version)
        for name, p in model.named_parameters()
        if name not in left_out and id(p) not in values
    )
