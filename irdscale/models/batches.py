"""Batches of samples of like lengths, shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from irdscale.distributed.ranks import rank_and_world
from irdscale.distributed.zero3 import is_partitioned
from irdscale.utils.progress import bar

# Batches whose results are read from the device at once: each reading waits for all that runs there.
UNREAD = 64


class LateRows:
    """Puts what was measured of some rows of a table on the device into the table in main memory, late.

    Args:
        table: tensor [N, ...] on the CPU.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._unread: list[tuple[list[int], Tensor]] = []

    def add(self, places: list[int], rows: Tensor) -> None:
        """Take the rows [len(places), ...] at these places; no wait, but once in `UNREAD` calls."""
        self._unread.append((places, rows))
        if len(self._unread) == UNREAD:
            self.read()

    def read(self) -> None:
        """Put all rows taken so far into the table."""
        if self._unread:
            places = [place for each, _ in self._unread for place in each]
            self._table[places] = torch.cat([rows.to(self._table.dtype) for _, rows in self._unread]).cpu()
            self._unread.clear()


def shared_batches(
    model: nn.Module,
    lengths: Sequence[int],
    batch_size: int,
    work: Callable[[list[int]], None],
    *,
    equal: bool = False,
) -> None:
    """Call `work` with the places of each batch, those of like lengths together, which wastes no time on padding.

    The ranks share the batches. A rank with nothing left of a partitioned model works on no places, for it gathers with
    the others.

    Args:
        equal: no batch holds samples of unlike lengths, so that none is padded.
    """
    rank, world = rank_and_world()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    runs = [list(run) for _, run in groupby(order, lengths.__getitem__)] if equal else [order]
    batches = [run[i : i + batch_size] for run in runs for i in range(0, len(run), batch_size)]
    own = batches[rank::world]
    if is_partitioned(model):
        own += [[]] * (-(-len(batches) // world) - len(own))
    # No bar of its own, but who listens from outside hears that it goes on.
    with bar("Evaluating", len(own), enabled=False) as advance:
        for places in own:
            advance()
            work(places)
