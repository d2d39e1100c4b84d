"""The result of a Fisher pass, replicated on every rank or sharded over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from irdscale.distributed.ranks import gather_flat, rank_and_world, slice_of
from irdscale.masks.topk import Slice

Layout = Literal["replicated", "sharded"]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Fisher:
    """Diagonal Fisher information and per-sample traces.

    Attributes:
        diagonal: name -> mean over samples of the squared gradient, in the parameter's shape (replicated) or as this
            rank's slice of the flat parameter (sharded; `irdscale.distributed.ranks.slice_of`)
        sample_trace: float64 [N], each sample's Fisher trace in data set order, over the names of `diagonal`
        sample_gradients: gradients of single samples that all ranks took for it
        sharded_shapes: name -> shape of the full parameter; needed if sharded
    """

    diagonal: dict[str, Tensor]
    sample_trace: Tensor
    sample_gradients: int = 0
    layout: Layout = "replicated"
    sharded_shapes: Shapes | None = None

    @property
    def shapes(self) -> Shapes:
        """name -> shape of the full parameter."""
        return self.sharded_shapes or {name: tuple(d.shape) for name, d in self.diagonal.items()}

    def gather(self) -> dict[str, Tensor]:
        """The full diagonal on every rank; collective if sharded."""
        if self.layout == "replicated":
            return self.diagonal
        return {name: _gathered(part, self.shapes[name]) for name, part in self.diagonal.items()}

    def slices(self) -> dict[str, Slice]:
        """This rank's part of each parameter."""
        if self.layout == "replicated":
            return {name: Slice(0, d.reshape(-1)) for name, d in self.diagonal.items()}
        starts = {name: slice_of(torch.Size(shape).numel())[0] for name, shape in self.shapes.items()}
        return {name: Slice(starts[name], part) for name, part in self.diagonal.items()}


def _gathered(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The full tensor from every rank's slice."""
    numel, world = torch.Size(shape).numel(), rank_and_world()[1]
    bounds = [slice_of(numel, rank) for rank in range(world)]
    return gather_flat(part, [stop - start for start, stop in bounds]).view(shape)
