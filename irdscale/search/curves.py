"""TensorBoard curves of a search on a cluster: loss, learning rate and selection metric of every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from irdscale.distributed.ranks import rank_and_world


@contextmanager
def curves(folder: Path) -> Iterator[Callable[..., None]]:
    """A function `draw(step, name=value, ...)` for the curves of one evaluation in `folder`, on rank 0."""
    if rank_and_world()[0] > 0:
        yield lambda step, **values: None
        return
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder))

    def draw(step: int, **values: float) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield draw
    finally:
        writer.close()
