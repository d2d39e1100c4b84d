"""Sums of squared gradients, replicated on every rank or sharded over the ranks.

Both take a parameter's terms as they arrive during a backward pass. Replicated sums differ between ranks until
`complete`. Sharded sums are reduce-scattered layer by layer during the backward pass, and always hold the samples of
all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from irdscale.distributed.ranks import all_reduce_sum, rank_and_world, slice_of
from irdscale.fisher.diagonal import Layout, Shapes
from irdscale.fisher.squares import Buffers, add_traces
from irdscale.fisher.terms import Term

# Function that adds a batch's terms of one parameter to its sum, and to the batch's traces unless they are None.
Add = Callable[[list[Term], Tensor, Tensor | None, Buffers], None]


def _reduce_scatter(own: Tensor, full: Tensor) -> dist.Work:
    # torch 2.13 renamed it.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work: dist.Work = reduce_scatter(own, full, async_op=True)
    return work


class Sums:
    """Takes the gradients of a pass over samples; this base class keeps no sums.

    Attributes:
        tensors: name -> this rank's part of the sum, in the parameter's shape (replicated) or flat (sharded)
        in_step: whether all ranks must make the same number of backward passes
    """

    layout: Layout = "replicated"
    in_step = False

    def __init__(self, shapes: Shapes) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._shapes, self._buffers = shapes, Buffers()

    def arrive(self, name: str, terms: list[Term], trace_B: Tensor | None) -> None:
        """Add one parameter's terms over a batch to its sum, and to the traces [B] if given; no terms mean zero."""
        if terms and trace_B is not None:
            add_traces(terms, torch.Size(self._shapes[name]), trace_B, self._buffers)

    def end_backward(self) -> None:
        """End one backward pass; a parameter that did not arrive had no gradient."""
        self._buffers.forget()

    def complete(self) -> None:
        """Make the sums those of all ranks' samples."""

    def resume(self) -> None:
        """Prepare for more samples after `complete`."""


class MainMemoryAdder:
    """Adds GPU tensors to sums in main memory, one call late, so that the GPU computes during each copy.

    It holds two pinned buffers of the size of the largest tensor.
    """

    def __init__(self) -> None:
        self._pinned: list[Tensor] = []
        self._pending: tuple[torch.cuda.Event, Tensor, Tensor] | None = None

    def add(self, total: Tensor, part: Tensor) -> None:
        """total += part, at the latest when `finish` returns; `part` may be overwritten at once.

        Args:
            total: contiguous, on the CPU, with the number of entries and data type of `part`
        """
        if not part.is_cuda:
            total += part.view_as(total)
            return
        if not self._pinned or self._pinned[0].numel() < part.numel():
            self.finish()
            self._pinned = [torch.empty(part.numel(), dtype=part.dtype, pin_memory=True) for _ in range(2)]
        self._pinned.reverse()
        copied = self._pinned[0][: part.numel()]
        copied.copy_(part.reshape(-1), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(part.device))
        self.finish()
        self._pending = event, total, copied

    def finish(self) -> None:
        """Wait for the last copy and add it."""
        if self._pending is not None:
            event, total, copied = self._pending
            event.synchronize()
            total += copied.view_as(total)
            self._pending = None


class ReplicatedSums(Sums):
    """Sums of each rank's own samples, in the parameters' shapes.

    Args:
        offload: keep the sums in main memory; each layer's batch sum is formed on the model's device, then copied
    """

    def __init__(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, add: Add, offload: bool = False
    ) -> None:
        super().__init__(shapes)
        where = torch.device("cpu") if offload else device
        self.tensors = {name: torch.zeros(shape, dtype=dtype, device=where) for name, shape in shapes.items()}
        self._add, self._adder = add, MainMemoryAdder()
        self._device, self._offload, self._batch_sums = device, offload, Buffers()

    def arrive(self, name: str, terms: list[Term], trace_B: Tensor | None) -> None:
        total = self.tensors[name]
        if not terms:
            return
        if not self._offload:
            self._add(terms, total, trace_B, self._buffers)
            return
        batch_sum = self._batch_sums.take(total.shape, total.new_empty(0, device=self._device)).zero_()
        self._add(terms, batch_sum, trace_B, self._buffers)
        self._adder.add(total, batch_sum)

    def end_backward(self) -> None:
        self._adder.finish()
        self._buffers.forget()

    def complete(self) -> None:
        all_reduce_sum(list(self.tensors.values()))

    def resume(self) -> None:
        # The completed sums count once.
        if rank_and_world()[0] > 0:
            for total in self.tensors.values():
                total.zero_()


class ShardedSums(Sums):
    """Sums of all ranks' samples; each rank holds 1 / world size of each parameter's entries.

    Each layer's batch sum is formed in a buffer and reduce-scattered asynchronously. The buffers in flight share memory
    of the size of the largest layer.

    Args:
        order: every scored name, in the order in which a backward pass delivers them, the same on all ranks
        offload: keep the slices in main memory
    """

    layout: Layout = "sharded"
    in_step = True

    def __init__(
        self,
        shapes: Shapes,
        dtype: torch.dtype,
        device: torch.device,
        add: Add,
        order: list[str],
        offload: bool = False,
    ) -> None:
        super().__init__(shapes)
        self._order, self._device, self._dtype = order, device, dtype
        self._numel = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        self._world = rank_and_world()[1]
        where = torch.device("cpu") if offload else device
        for name, numel in self._numel.items():
            start, stop = slice_of(numel)
            self.tensors[name] = torch.zeros(stop - start, dtype=dtype, device=where)
        self._pool = torch.empty(max(map(self._padded, shapes)), dtype=dtype, device=device)
        self._used = 0
        self._add, self._adder = add, MainMemoryAdder()
        self._ready: dict[str, Tensor] = {}
        self._sent: list[tuple[dist.Work, str, Tensor, Tensor]] = []
        self._next = 0

    def _padded(self, name: str) -> int:
        return -(-self._numel[name] // self._world) * self._world

    def arrive(self, name: str, terms: list[Term], trace_B: Tensor | None) -> None:
        buffer = self._zeros(name)
        if terms:
            self._add(terms, buffer[: self._numel[name]].view(self._shapes[name]), trace_B, self._buffers)
        self._ready[name] = buffer
        while self._next < len(self._order) and self._order[self._next] in self._ready:
            self._send(self._ready.pop(self._order[self._next]))

    def _zeros(self, name: str) -> Tensor:
        """A buffer of zeros, after waiting for those in flight if they leave too little memory."""
        size = self._padded(name)
        if self._used + size > len(self._pool):
            while self._sent:
                self._receive()
            if not self._ready:
                self._used = 0
        if self._used + size > len(self._pool):
            # Only if this backward pass has another order than `order`.
            return torch.zeros(size, dtype=self._dtype, device=self._device)
        self._used += size
        return self._pool[self._used - size : self._used].zero_()

    def _send(self, buffer: Tensor) -> None:
        name = self._order[self._next]
        own = torch.empty(len(buffer) // self._world, dtype=self._dtype, device=self._device)
        work = _reduce_scatter(own, buffer)
        self._sent.append((work, name, buffer, own))
        self._next += 1

    def _receive(self) -> None:
        work, name, _, own = self._sent.pop(0)
        work.wait()
        part = self.tensors[name]
        if part.device == own.device:
            part += own[: len(part)]
        else:
            self._adder.add(part, own[: len(part)])

    def end_backward(self) -> None:
        while self._next < len(self._order):
            name = self._order[self._next]
            ready = self._ready.pop(name, None)
            self._send(self._zeros(name) if ready is None else ready)
        while self._sent:
            self._receive()
        self._adder.finish()
        self._next = self._used = 0
        self._buffers.forget()
