"""Whether the sums of a Fisher pass fit in memory, options that would make them fit, and groups that do."""

from __future__ import annotations

import socket
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from irdscale.distributed.ranks import gather_texts, rank_and_world
from irdscale.errors import InputError
from irdscale.fisher.diagonal import Layout, Shapes
from irdscale.utils.formats import size
from irdscale.utils.groups import divided

if TYPE_CHECKING:
    from irdscale.fisher.passes import SampleGradients

Passes = int | Literal["auto"]
# Largest share of the free memory that the sums of a group may take.
USED = 0.9


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


def _free(device: torch.device, offload: bool) -> tuple[int, float]:
    """Bytes for a rank's sums, those of the rank with the least, and this rank's share of main memory; collective."""
    main = free_main_memory() / gather_texts(socket.gethostname()).count(socket.gethostname())
    own = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" and not offload else main
    return min(map(int, gather_texts(str(int(own))))), main


def check_memory(shapes: Shapes, dtype: torch.dtype, layout: Layout, device: torch.device, offload: bool) -> None:
    """Check that the sums fit in memory; collective.

    Raises:
        InputError: they do not; names the needed and free memory, and options that would fit.
    """
    world = rank_and_world()[1]
    needed, (least, main) = bytes_needed(shapes, dtype.itemsize, layout, world), _free(device, offload)
    if needed <= least:
        return
    ways = []
    ranks = ranks_needed(shapes, dtype.itemsize, least)
    if ranks is not None:
        ways.append(f"layout 'sharded' over {ranks} or more such ranks")
    if device.type == "cuda" and not offload and needed <= main:
        ways.append("fisher.offload")
    if len(shapes) > 1:
        ways.append("fisher.passes=auto")
    ways.append("fewer parameters (fisher.include, fisher.exclude)")
    found = f"found sums of {size(needed)} per rank with layout '{layout}' and {size(least)} of memory free"
    raise InputError(found, ", or ".join(ways), "fisher.layout")


def fewest(shapes: Shapes, fits: Callable[[Shapes], bool]) -> int:
    """The fewest passes whose groups all fit; the number of parameters if there are none."""
    for passes in range(1, len(shapes)):
        if all(fits({name: shapes[name] for name in group}) for group in divided(shapes, passes)):
            return passes
    return max(1, len(shapes))


def groups_for(
    samples: SampleGradients, passes: Passes, dtype: torch.dtype, layout: Layout, offload: bool
) -> list[list[str]]:
    """The groups of the scored parameters; collective: the rank with the least free memory decides for all.

    Args:
        passes: number of groups, or `auto` for the fewest whose sums fit in the free memory
    """
    shapes, world = samples.shapes, rank_and_world()[1]
    if passes == "auto":
        least = USED * _free(samples.device, offload)[0]
        passes = fewest(shapes, lambda group: bytes_needed(group, dtype.itemsize, layout, world) <= least)
    return divided(shapes, passes)
