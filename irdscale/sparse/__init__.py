"""Sparse training: k trainable numbers on a frozen base, and the adapters they are saved to."""

from irdscale.sparse.adapter import load_adapter, save_adapter
from irdscale.sparse.heads import adapter_head
from irdscale.sparse.hub import pull_adapter, push_adapter
from irdscale.sparse.model import (
    base_hash,
    entries_of,
    matching_parameters,
    merge,
    sparse_state,
    sparsify,
    trained_numbers,
    trained_on,
    unload,
)
from irdscale.sparse.shira import export_shira
from irdscale.sparse.switch import switch_adapter

__all__ = [
    "adapter_head",
    "base_hash",
    "entries_of",
    "export_shira",
    "load_adapter",
    "matching_parameters",
    "merge",
    "pull_adapter",
    "push_adapter",
    "save_adapter",
    "sparse_state",
    "sparsify",
    "switch_adapter",
    "trained_numbers",
    "trained_on",
    "unload",
]
