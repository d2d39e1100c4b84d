"""Collated batches and their parts, and batches of samples of similar length, sharded over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from irdscale.distributed.ranks import rank_and_world
from irdscale.distributed.zero3 import is_partitioned
from irdscale.utils.progress import bar

# Batches whose results are copied from the device together: each copy waits for the device.
UNREAD = 64
# Tokens of a text on which a model is tried before a pass.
FIRST = 64

Collate = Callable[[list[Any]], dict[str, Any]]


class SizedDataset(Protocol):
    """Anything with a length and rows, such as a datasets.Dataset or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def batch_size(batch: dict[str, Any]) -> int:
    """Number of samples in a collated batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def rows_of(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Some samples of a collated batch, padded as in the batch."""
    size = batch_size(batch)
    return {
        key: value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
        for key, value in batch.items()
    }


def by_token(batch: dict[str, Any], select: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A batch of texts with `select` applied to every tensor [B, T, ...] that has a value per token."""
    length = batch["input_ids"].shape[1]
    return {
        key: select(value) if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length else value
        for key, value in batch.items()
    }


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on a device, without waiting for the work there."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def has_token_labels(batch: dict[str, Any]) -> bool:
    """Whether the batch holds texts with one label per token."""
    labels, tokens = batch.get("labels"), batch.get("input_ids")
    return isinstance(labels, Tensor) and isinstance(tokens, Tensor) and labels.dim() == 2 == tokens.dim()


class LateRows:
    """Copies rows of a table from the device to the table in main memory, many batches at a time.

    Args:
        table: tensor [N, ...] on the CPU
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._unread: list[tuple[list[int], Tensor]] = []

    def add(self, places: list[int], rows: Tensor) -> None:
        """Take the rows [len(places), ...] at these places; waits for the device once in `UNREAD` calls."""
        self._unread.append((places, rows))
        if len(self._unread) == UNREAD:
            self.read()

    def read(self) -> None:
        """Copy all rows taken so far into the table."""
        if self._unread:
            places = [place for each, _ in self._unread for place in each]
            self._table[places] = torch.cat([rows.to(self._table.dtype) for _, rows in self._unread]).cpu()
            self._unread.clear()


def shared_batches(
    model: nn.Module, lengths: Sequence[int], batch_size: int, work: Callable[[list[int]], None], *, equal: bool = False
) -> None:
    """Call `work` with the places of each batch of this rank; samples of similar length share a batch, to pad less.

    With a partitioned model every rank makes the same number of calls, the last ones perhaps without places, since all
    ranks gather the parameters together.

    Args:
        equal: samples of different lengths never share a batch, so nothing is padded
    """
    rank, world = rank_and_world()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    runs = [list(run) for _, run in groupby(order, lengths.__getitem__)] if equal else [order]
    batches = [run[i : i + batch_size] for run in runs for i in range(0, len(run), batch_size)]
    own = batches[rank::world]
    if is_partitioned(model):
        own += [[]] * (-(-len(batches) // world) - len(own))
    # The bar is never drawn: it only reports to a progress listener.
    with bar("Evaluating", len(own), enabled=False) as advance:
        for places in own:
            advance()
            work(places)
