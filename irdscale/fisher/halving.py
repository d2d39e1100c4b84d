"""The batches of a pass, halved where they do not fit in memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from irdscale.errors import InputError

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """Samples of one batch, and how far its gradients are delivered.

    Attributes:
        delivered: (backward pass, parameter name) of each gradient that is in the sums
        adding: whether a gradient is being added to the sums
    """

    indices: list[int]
    delivered: set[tuple[int, str]] = field(default_factory=set)
    adding: bool = False


@dataclass
class Batches:
    """Batches of a rank's samples; one that does not fit in memory is halved, and all later ones are smaller.

    Attributes:
        size: samples in a batch
        halves: halves of batches that did not fit, which are next
    """

    size: int = 0
    halves: list[Batch] = field(default_factory=list)

    def missing(self, left: list[int]) -> int:
        """Number of batches to take."""
        return len(self.halves) + -(-len(left) // self.size)

    def next(self, left: list[int]) -> Batch | None:
        """The next batch, removed from the samples that are left; None at the end."""
        if self.halves:
            return self.halves.pop()
        batch = Batch(left[: self.size])
        del left[: self.size]
        return batch if batch.indices else None

    def halve(self, batch: Batch, error: Exception, *, may_halve: bool) -> None:
        """Replace a batch that did not fit by its halves, which do not deliver again what it has delivered.

        Args:
            may_halve: whether this rank may make more backward passes than others

        Raises:
            InputError: the batch cannot be halved.
        """
        size = len(batch.indices)
        if size == 1 or batch.adding or not may_halve:
            raise InputError(
                f"a batch of {size} does not fit in memory",
                "a smaller one, shorter samples, or more ranks with layout 'sharded'",
                key="fisher.batch_size",
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.size > size // 2:
            self.size = size // 2
            log.warning("fisher.batch_size: %d does not fit in memory; continuing with %d", size, self.size)
        for part in (batch.indices[: size // 2], batch.indices[size // 2 :]):
            self.halves.append(Batch(part, set(batch.delivered)))
