"""What data-parallel ranks do together: share out the samples, add up what they found, and fail together.

Without a process group there is one rank, and all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from irdscale.errors import InputError, RunError

# Smaller tensors are joined before they are added up: many small messages cost more than a copy.
BUCKET_ENTRIES = 4 * 2**20


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def current_group() -> object:
    """The process group of all ranks, for comparison; None without one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def shard(items: Sequence[int]) -> list[int]:
    """Every world-size-th item: each goes to one rank, none twice; a rank may get none."""
    rank, world = rank_and_world()
    return list(items[rank::world])


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in place. Every rank passes the same shapes in the same order."""
    if rank_and_world()[1] == 1:
        return
    waiting: list[Tensor] = []
    for tensor in tensors:
        if waiting and _space_left(waiting, tensor) < 0:
            _all_reduce_flattened(waiting)
            waiting = []
        waiting.append(tensor)
    if waiting:
        _all_reduce_flattened(waiting)


def _space_left(waiting: list[Tensor], tensor: Tensor) -> int:
    if (waiting[0].dtype, waiting[0].device) != (tensor.dtype, tensor.device):
        return -1
    return BUCKET_ENTRIES - sum(t.numel() for t in waiting) - tensor.numel()


def _all_reduce_flattened(tensors: list[Tensor]) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        _all_reduce(tensors[0])
        return
    joined = torch.cat([t.reshape(-1) for t in tensors])
    _all_reduce(joined)
    for tensor, part in zip(tensors, joined.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _all_reduce(tensor: Tensor) -> None:
    moved = tensor.to(_device())
    dist.all_reduce(moved)
    if moved is not tensor:
        tensor.copy_(moved)


def slice_of(numel: int, rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """The run of a flat tensor's entries that a rank holds of a sharded one; the last ranks may hold fewer, or none.

    Args:
        rank, world: this rank, and as many as there are, unless given.
    """
    own, ranks = rank_and_world()
    rank, world = own if rank is None else rank, ranks if world is None else world
    share = -(-numel // world)
    return min(rank * share, numel), min((rank + 1) * share, numel)


def gather_flat(tensor: Tensor, lengths: Sequence[int]) -> Tensor:
    """Every rank's flat tensor, joined by rank, on every rank.

    Args:
        lengths: how long each rank's is.
    """
    _, world = rank_and_world()
    if world == 1:
        return tensor
    padded = torch.zeros(max(lengths), dtype=tensor.dtype, device=_device())
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]).to(tensor.device)


def _device() -> torch.device:
    """Where the process group takes tensors from."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def largest_of(numbers: Sequence[int]) -> list[int]:
    """The largest of every rank's numbers, place by place."""
    if rank_and_world()[1] == 1:
        return [int(n) for n in numbers]
    tensor = torch.tensor([int(n) for n in numbers], dtype=torch.int64, device=_device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def gather_texts(text: str) -> list[str]:
    """Every rank's text, by rank."""
    _, world = rank_and_world()
    if world == 1:
        return [text]
    device = _device()
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    lengths = torch.zeros(world, dtype=torch.int64, device=device)
    lengths[dist.get_rank()] = len(data)
    dist.all_reduce(lengths)
    padded = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    parts = [torch.zeros_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return [bytes(p[:n].tolist()).decode() for p, n in zip(parts, lengths.tolist(), strict=True)]


def broadcast_flag(flag: bool) -> bool:
    """What rank 0 found, on every rank: it writes the files, so it knows which there are."""
    return gather_texts(str(int(flag)))[0] == "1"


@contextmanager
def failing_together() -> Iterator[None]:
    """Run what this rank does alone; if a rank fails, all do, instead of waiting for it for ever.

    Raises:
        InputError: the first failed rank's bad input, on every rank.
        RunError: another rank died of something else; it is named.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    if not largest_of([own is not None])[0]:
        return
    texts = gather_texts("" if own is None else f"{int(isinstance(own, InputError))}{own or type(own).__name__}")
    if own is not None:
        raise own
    for rank, text in enumerate(texts):
        if text:
            problem = f"rank {rank}: {text[1:]}"
            raise InputError(problem) if text[0] == "1" else RunError(problem)


def same_on_every_rank(facts: dict[str, Any]) -> None:
    """Check that all ranks were given the same work.

    Args:
        facts: what must be equal -> its value or hash.

    Raises:
        InputError: a rank has another value than rank 0; names the rank and what differs.
    """
    described = "\n".join(f"{name}={value}".replace("\n", " ") for name, value in facts.items())
    texts = gather_texts(described)
    for rank, text in enumerate(texts):
        for first, other in zip(texts[0].split("\n"), text.split("\n"), strict=True):
            if first != other:
                name, _, expected = first.partition("=")
                found = other.partition("=")[2]
                raise InputError(f"rank {rank} has another {name}: found {found}; expected {expected}, as on rank 0")


def end_rank() -> NoReturn:
    """End a spawned rank once all are here, without taking the interpreter down, as `process_group.leave` does."""
    dist.barrier()
    os._exit(0)
