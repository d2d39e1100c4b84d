"""Whether the sums of a Fisher pass fit in memory, and what would make them fit."""

from __future__ import annotations

import socket
from pathlib import Path

import torch

from irdscale.distributed.ranks import gather_texts, rank_and_world
from irdscale.errors import InputError
from irdscale.fisher.diagonal import Layout, Shapes

GIB = 2**30


def bytes_needed(shapes: Shapes, item: int, layout: Layout, world: int) -> int:
    """Bytes that a rank needs for its sums and the buffers of the largest layer: one sample's gradient, a batch's sum.

    Args:
        item: bytes an entry.
    """
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    if layout == "replicated" or world == 1:
        return item * (sum(sizes) + max(sizes))
    return item * (sum(-(-n // world) for n in sizes) + 2 * max(sizes))


def ranks_needed(shapes: Shapes, item: int, free: float) -> int | None:
    """The fewest ranks over which sharded sums fit, each in `free` bytes; None if a layer's buffers are too large."""
    fewest, most = 2, sum(torch.Size(shape).numel() for shape in shapes.values())
    if bytes_needed(shapes, item, "sharded", most) > free:
        return None
    while fewest < most:
        middle = (fewest + most) // 2
        if bytes_needed(shapes, item, "sharded", middle) <= free:
            most = middle
        else:
            fewest = middle + 1
    return fewest


def free_main_memory() -> int:
    """Bytes of main memory that this process may still take: of the machine, or of its container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free


def check_room(shapes: Shapes, dtype: torch.dtype, layout: Layout, device: torch.device, offload: bool) -> None:
    """Refuse sums that do not fit; collective.

    Raises:
        InputError: says how many bytes are missing, and how many ranks, which layout or where would do.
    """
    world = rank_and_world()[1]
    hosts = gather_texts(socket.gethostname())
    beside = hosts.count(socket.gethostname())
    on_device = device.type == "cuda" and not offload
    free = torch.cuda.mem_get_info(device)[0] if on_device else free_main_memory() / beside
    needed = bytes_needed(shapes, dtype.itemsize, layout, world)
    # The rank with the least room speaks for all.
    rooms = [int(text) for text in gather_texts(str(int(free)))]
    least = min(rooms)
    if needed <= least:
        return
    ways = []
    ranks = ranks_needed(shapes, dtype.itemsize, least)
    if ranks is not None:
        ways.append(f"layout 'sharded' over {ranks} ranks or more with as much memory each")
    if on_device and needed <= free_main_memory() / beside:
        ways.append("fisher.offload")
    if len(shapes) > 1:
        ways.append("fisher.passes=auto")
    ways.append("fewer parameters (fisher.include, fisher.exclude)")
    raise InputError(
        f"fisher.layout: found sums of {needed / GIB:.1f} GiB a rank with layout '{layout}' and {least / GIB:.1f} GiB "
        f"of free memory; expected {', or '.join(ways)}"
    )
