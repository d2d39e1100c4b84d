"""The hash of a sparse model's frozen base, remembered for as long as nothing was seen to write to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from irdscale.sparse.model import base_hash, sparse_state


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


def _stamp(model: nn.Module, left_out: frozenset[str]) -> tuple[Any, ...]:
    """Where each frozen parameter lies, and how often autograd saw it written to."""
    values = {id(entries.values) for entries in sparse_state(model).patched}
    return tuple(
        (name, p.data_ptr(), p.dtype, p.device, p._version)
        for name, p in model.named_parameters()
        if name not in left_out and id(p) not in values
    )
