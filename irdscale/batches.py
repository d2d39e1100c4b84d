"""Batches of samples of like lengths, shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from irdscale.partitioned import is_partitioned
from irdscale.progress import bar
from irdscale.ranks import rank_and_world


def shared_batches(
    model: nn.Module, lengths: Sequence[int], batch_size: int, work: Callable[[list[int]], None]
) -> None:
    """Call `work` with the places of each batch, those of like lengths together, which wastes no time on padding.

    The ranks share the batches. A rank with nothing left of a partitioned model works on no places, for it gathers with
    the others.
    """
    rank, world = rank_and_world()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    own = batches[rank::world]
    if is_partitioned(model):
        own += [[]] * (-(-len(batches) // world) - len(own))
    # No bar of its own, but who listens from outside hears that it goes on.
    with bar("Evaluating", len(own), enabled=False) as advance:
        for places in own:
            advance()
            work(places)
