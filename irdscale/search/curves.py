"""TensorBoard curves of a search on a cluster: loss, learning rate and selection metric of every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from irdscale.distributed.ranks import rank_and_world
from irdscale.search.candidates import Candidate


@contextmanager
def curves(output: Path, candidate: Candidate) -> Iterator[Callable[..., None]]:
    """A function `draw(step, name=value, ...)` for the curves of one evaluation in OUTPUT/tensorboard, on rank 0."""
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
