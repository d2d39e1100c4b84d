"""TensorBoard curves of a search on a cluster: loss, learning rate and selection metric of every evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from irdscale.distributed.ranks import rank_and_world
from irdscale.search.candidates import Candidate


class Draw(Protocol):
    def __call__(self, step: int, **values: float) -> None:
        """Add a point to each of the named curves."""


@contextmanager
def curves(output: Path, candidate: Candidate) -> Iterator[Draw]:
    """Curves of one evaluation, which rank 0 writes to OUTPUT/tensorboard."""
    if rank_and_world()[0] > 0:
        yield lambda step, **values: None
        return
    from tensorboardX import SummaryWriter

    pair, stage = candidate.pair, candidate.direction if candidate.round is None else f"round{candidate.round}"
    rate = "" if candidate.train is None else f"-rate{candidate.train.learning_rate:g}"
    name = f"{stage}-{pair.samples}samples-{pair.params}parameters{rate}-seed{candidate.seed}"
    writer = SummaryWriter(str(output / "tensorboard" / name))

    def draw(step: int, **values: float) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield draw
    finally:
        writer.close()
