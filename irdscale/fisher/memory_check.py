"""A check that the sums of a Fisher pass fit in memory, with the options that would make them fit."""

from __future__ import annotations

import socket
from bisect import bisect_left
from pathlib import Path

import torch

from irdscale.distributed.ranks import gather_texts, rank_and_world
from irdscale.errors import InputError
from irdscale.fisher.diagonal import Layout, Shapes
from irdscale.utils.formats import size


def bytes_needed(shapes: Shapes, item: int, layout: Layout, world: int) -> int:
    """Bytes per rank for the sums and the buffers of the largest layer (a sample's gradient, and a batch's sum).

    Args:
        item: bytes per entry
    """
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    if layout == "replicated" or world == 1:
        return item * (sum(sizes) + max(sizes))
    return item * (sum(-(-n // world) for n in sizes) + 2 * max(sizes))


def ranks_needed(shapes: Shapes, item: int, free: float) -> int | None:
    """The fewest ranks, each with `free` bytes, over which sharded sums fit; None if a layer's buffers do not fit."""
    counts = range(2, sum(torch.Size(shape).numel() for shape in shapes.values()) + 1)
    found = bisect_left(counts, True, key=lambda world: bytes_needed(shapes, item, "sharded", world) <= free)
    return counts[found] if found < len(counts) else None


def free_main_memory() -> int:
    """Bytes of main memory that are free on the machine, or in its container if that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free


def check_memory(shapes: Shapes, dtype: torch.dtype, layout: Layout, device: torch.device, offload: bool) -> None:
    """Check that the sums fit in memory; collective.

    Raises:
        InputError: they do not; names the needed and free memory, and options that would fit.
    """
    world = rank_and_world()[1]
    hosts = gather_texts(socket.gethostname())
    beside = hosts.count(socket.gethostname())
    on_device = device.type == "cuda" and not offload
    free = torch.cuda.mem_get_info(device)[0] if on_device else free_main_memory() / beside
    needed = bytes_needed(shapes, dtype.itemsize, layout, world)
    least = min(map(int, gather_texts(str(int(free)))))
    if needed <= least:
        return
    ways = []
    ranks = ranks_needed(shapes, dtype.itemsize, least)
    if ranks is not None:
        ways.append(f"layout 'sharded' over {ranks} or more such ranks")
    if on_device and needed <= free_main_memory() / beside:
        ways.append("fisher.offload")
    if len(shapes) > 1:
        ways.append("fisher.passes=auto")
    ways.append("fewer parameters (fisher.include, fisher.exclude)")
    found = f"found sums of {size(needed)} per rank with layout '{layout}' and {size(least)} of memory free"
    raise InputError(found, ", or ".join(ways), "fisher.layout")
