"""The hash of a sparse model's frozen base, remembered for as long as nothing was seen to write to it.

Who lends one base model to many, and compares its weights each time that it comes back, vouches for its hashes: they
outlast the sparse model, and adapters are saved with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from irdscale.sparse.model import VOUCHED, base_hash, is_sparse, sparse_state


def known_hash(model: nn.Module, without: Iterable[str]) -> str:
    """`base_hash(model, without)`, taken anew only where the base may have changed since it was last taken.

    A tensor that was replaced (another dtype, another device) or written to (autograd counts that) is seen; a write
    through `.data` is not.
    """
    state, left_out = sparse_state(model), frozenset(without)
    stamp = _stamp(model, left_out)
    known = state.known_bases.get(left_out)
    if known is None or known[0] != stamp:
        known = state.known_bases[left_out] = (stamp, base_hash(model, left_out))
    return known[1]


def vouch(model: nn.Module, hashes: Mapping[frozenset[str], str]) -> None:
    """Tell a plain model what its base's hashes are, for when it is sparse.

    Args:
        hashes: names of the parameters that are left out -> `base_hash` without them.
    """
    vars(model)[VOUCHED] = {left_out: (_stamp(model, left_out), known) for left_out, known in hashes.items()}


def is_vouched(model: nn.Module) -> bool:
    """Whether somebody vouches for what is known of the base."""
    return VOUCHED in vars(model)


def known_hashes(model: nn.Module) -> dict[frozenset[str], str]:
    """The hashes of a sparse model's base that are known and hold, by the parameters that are left out."""
    known = sparse_state(model).known_bases.items()
    return {left_out: found for left_out, (stamp, found) in known if stamp == _stamp(model, left_out)}


def _stamp(model: nn.Module, left_out: frozenset[str]) -> tuple[Any, ...]:
    """Where each frozen parameter lies, and how often autograd saw it written to."""
    values = {id(entries.values) for entries in sparse_state(model).patched} if is_sparse(model) else set()
    return tuple(
        (name, p.data_ptr(), p.dtype, p.device, p._version)
        for name, p in model.named_parameters()
        if name not in left_out and id(p) not in values
    )
