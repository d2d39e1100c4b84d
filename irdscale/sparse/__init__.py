"""Sparse training: k trainable deltas on a frozen base."""

from irdscale.sparse.model import (
    base_hash,
    dense_beside_mask,
    entries_of,
    matching_parameters,
    merge,
    sparse_state,
    sparsify,
    trained_numbers,
    trained_on,
    unload,
)

__all__ = [
    "base_hash",
    "dense_beside_mask",
    "entries_of",
    "matching_parameters",
    "merge",
    "sparse_state",
    "sparsify",
    "trained_numbers",
    "trained_on",
    "unload",
]
