"""Where squared gradients are summed: in whole tensors on each rank, or in slices over the ranks.

Both take a parameter's terms as they arrive during a backward pass. Whole sums differ from rank to rank until
`complete`; slices are reduce-scattered layer by layer while the backward goes on, and hold all ranks' samples always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from irdscale.distributed.ranks import all_reduce_sum, rank_and_world, slice_of
from irdscale.fisher.diagonal import Fisher, Layout, Shapes
from irdscale.fisher.squares import Buffers
from irdscale.fisher.terms import Term

# Adds a batch's terms of one parameter to its sum, and to the batch's traces where they are wanted.
Add = Callable[[list[Term], Tensor, Tensor | None, Buffers], None]


def _reduce_scatter(own: Tensor, whole: Tensor) -> dist.Work:
    # torch 2.13 renamed it.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work: dist.Work = reduce_scatter(own, whole, async_op=True)
    return work


class Sums(Protocol):
    """What a pass over samples adds to.

    Attributes:
        tensors: name -> this rank's part, in the parameter's shape or flat.
        layout: which of the two.
        in_step: whether all ranks must make the same number of backward passes.
    """

    tensors: dict[str, Tensor]
    layout: Layout
    in_step: bool

    def arrive(self, name: str, terms: list[Term], trace_B: Tensor | None) -> None:
        """Take one parameter's terms over a batch; none count as a gradient of zero."""

    def end_backward(self) -> None:
        """One backward pass is over; what did not arrive had no gradient."""

    def complete(self) -> None:
        """Make the sums those of all ranks' samples."""

    def go_on(self) -> None:
        """More samples follow after `complete`."""

    def fisher(self, traces: Tensor, taken: int) -> Fisher:
        """The sums as they stand."""


class MainMemoryAdder:
    """Adds tensors of a GPU to sums in main memory, one behind: the GPU goes on while one is on its way.

    Holds two pinned buffers of the largest tensor.
    """

    def __init__(self) -> None:
        self._pinned: list[Tensor] = []
        self._on_its_way: tuple[torch.cuda.Event, Tensor, Tensor] | None = None

    def add(self, total: Tensor, part: Tensor) -> None:
        """total += part, at the latest when `finish` returns; `part` may be written to again at once.

        Args:
            total: contiguous, on the CPU, of as many entries and the same data type as `part`.
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
        self._on_its_way = event, total, copied

    def finish(self) -> None:
        """Wait for what is on its way."""
        if self._on_its_way is not None:
            event, total, copied = self._on_its_way
            event.synchronize()
            total += copied.view_as(total)
            self._on_its_way = None


class WholeSums:
    """Each rank's own samples, in tensors of the parameters' shapes.

    Args:
        offload: the sums are kept in main memory; each layer's batch sum is made beside the model, then moved.
    """

    layout: Layout = "replicated"
    in_step = False

    def __init__(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, add: Add, offload: bool = False
    ) -> None:
        where = torch.device("cpu") if offload else device
        self.tensors = {name: torch.zeros(shape, dtype=dtype, device=where) for name, shape in shapes.items()}
        self._add, self._buffers = add, Buffers()
        self._device, self._offload, self._batch_sums = device, offload, Buffers()
        self._adder = MainMemoryAdder()

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

    def go_on(self) -> None:
        # What the sums hold already counts once.
        if rank_and_world()[0] > 0:
            for total in self.tensors.values():
                total.zero_()

    def fisher(self, traces: Tensor, taken: int) -> Fisher:
        return Fisher(self.tensors, traces, taken)


class ShardedSums:
    """All ranks' samples; this rank holds 1 / world size of each parameter's entries.

    A batch's sum of one layer is made in a buffer and reduce-scattered, asynchronously, as soon as it is there. All
    buffers on their way share the room of the largest layer.

    Args:
        order: every scored name, in the order in which all ranks send them: a backward pass delivers them so.
        offload: the slices are kept in main memory.
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
        self._shapes, self._order, self._device, self._dtype = shapes, order, device, dtype
        self._numel = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        self._world = rank_and_world()[1]
        where = torch.device("cpu") if offload else device
        self.tensors = {}
        for name, numel in self._numel.items():
            start, stop = slice_of(numel)
            self.tensors[name] = torch.zeros(stop - start, dtype=dtype, device=where)
        self._pool = torch.empty(max(map(self._padded, shapes)), dtype=dtype, device=device)
        self._used = 0
        self._add, self._buffers, self._adder = add, Buffers(), MainMemoryAdder()
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
        """A buffer of zeros, when those on their way leave room for it."""
        size = self._padded(name)
        if self._used + size > len(self._pool):
            while self._sent:
                self._receive()
            if not self._ready:
                self._used = 0
        if self._used + size > len(self._pool):
            # Only where a model's order differs from the one that all ranks keep.
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

    def complete(self) -> None:
        pass

    def go_on(self) -> None:
        pass

    def fisher(self, traces: Tensor, taken: int) -> Fisher:
        return Fisher(self.tensors, traces, taken, "sharded", self._shapes)
