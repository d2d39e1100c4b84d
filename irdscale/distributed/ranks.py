"""Operations of data-parallel ranks: shard samples, all-reduce, gather, and fail together.

Without a process group there is one rank, and these functions do nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from irdscale.errors import InputError, RunError
from irdscale.utils.files import write_json

# Entries of a flattened bucket of small tensors: many small messages cost more than a copy.
BUCKET_ENTRIES = 4 * 2**20


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and the world size."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def current_group() -> object:
    """The default process group, for comparison; None without one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def shard(items: Sequence[int]) -> list[int]:
    """Every world-size-th item: each goes to one rank, none twice; a rank may get none."""
    rank, world = rank_and_world()
    return list(items[rank::world])


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """All-reduce each tensor by its sum, in place. Every rank passes the same shapes in the same order."""
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
    bucket = torch.cat([t.reshape(-1) for t in tensors])
    _all_reduce(bucket)
    for tensor, part in zip(tensors, bucket.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _all_reduce(tensor: Tensor) -> None:
    moved = tensor.to(_device())
    dist.all_reduce(moved)
    if moved is not tensor:
        tensor.copy_(moved)


def slice_of(numel: int, rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """(start, stop) of a rank's shard of a flat tensor; the last ranks may hold fewer entries, or none.

    Args:
        rank, world: rank and world size; by default this process's.
    """
    own, ranks = rank_and_world()
    rank, world = own if rank is None else rank, ranks if world is None else world
    share = -(-numel // world)
    return min(rank * share, numel), min((rank + 1) * share, numel)


def gather_flat(tensor: Tensor, lengths: Sequence[int]) -> Tensor:
    """All ranks' flat tensors, concatenated by rank, on every rank.

    Args:
        lengths: length of each rank's tensor.
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
    """Device of the tensors that the process group communicates."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it exists, on rank 0."""
    if rank_and_world()[0] == 0:
        shutil.rmtree(folder, ignore_errors=True)


def largest_of(numbers: Sequence[int]) -> list[int]:
    """Elementwise maximum of the ranks' numbers, on every rank."""
    if rank_and_world()[1] == 1:
        return [int(n) for n in numbers]
    tensor = torch.tensor([int(n) for n in numbers], dtype=torch.int64, device=_device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def gather_texts(text: str) -> list[str]:
    """All ranks' texts, by rank, on every rank."""
    texts = [text] * rank_and_world()[1]
    if len(texts) > 1:
        dist.all_gather_object(texts, text)
    return texts


def broadcast_json(value: Any) -> Any:
    """Rank 0's value, which JSON can hold, on every rank; as JSON reads it again, on one rank too."""
    return json.loads(gather_texts(json.dumps(value))[0])


def write_json_once(path: Path, value: Any) -> None:
    """Write a JSON file on rank 0. Collective.

    Raises:
        RunError: the file cannot be written.
    """
    with failing_together():
        if rank_and_world()[0] == 0:
            write_json(path, value)


def broadcast_flag(flag: bool) -> bool:
    """Rank 0's flag, on every rank: rank 0 writes the files, so it knows which ones exist."""
    return gather_texts(str(int(flag)))[0] == "1"


@contextmanager
def failing_together() -> Iterator[None]:
    """Run work without collectives in the body; if it fails on one rank, all ranks fail instead of waiting forever.

    Raises:
        InputError: the first failed rank's bad input, on every rank.
        RunError: another rank failed for another reason; it is named.
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
    """Check that all ranks do the same work.

    Args:
        facts: name -> value or hash that must be equal on all ranks.

    Raises:
        InputError: a rank's value differs from rank 0's; names the rank and the value.
    """
    described = "\n".join(f"{name}={value}".replace("\n", " ") for name, value in facts.items())
    texts = gather_texts(described)
    for rank, text in enumerate(texts):
        for first, other in zip(texts[0].split("\n"), text.split("\n"), strict=True):
            if first != other:
                name, _, expected = first.partition("=")
                found = other.partition("=")[2]
                raise InputError(f"rank {rank} has another {name}: found {found}", f"{expected}, as on rank 0")


def end_rank() -> NoReturn:
    """End a spawned rank after a barrier, without shutting the interpreter down, as `process_group.leave` does."""
    dist.barrier()
    os._exit(0)
