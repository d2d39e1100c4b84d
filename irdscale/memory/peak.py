"""The peak of this process's GPU memory, measured."""

from __future__ import annotations

import torch

from irdscale.distributed.ranks import largest_of


def start_peak() -> None:
    """Begin to measure; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """Most bytes of tensors on the GPU since `start_peak`, on the rank with most; None without a GPU. Collective."""
    (most,) = largest_of([torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0])
    return most or None
