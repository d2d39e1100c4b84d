"""What identifies the work of a pass, to compare ranks with each other and a pass with its saved state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from irdscale.distributed.zero3 import shape_of
from irdscale.fisher.sample_loss import SampleLoss
from irdscale.utils.files import digest

# Samples of the data set, and entries of each parameter, that are compared.
SAMPLES = 8
ENTRIES = 64


def description_of(loss: SampleLoss, scored: dict[str, nn.Parameter], batch_size: int) -> dict[str, Any]:
    """What must be the same on every rank; of the data, a few samples from all over the data set."""
    parameters = [[name, list(shape_of(p)), str(p.dtype)] for name, p in scored.items()]
    entries = [] if loss.partitioned else first_entries(scored)
    count = len(loss.dataset)
    some = [count * i // SAMPLES for i in range(SAMPLES)] + [count - 1]
    rows = [sorted(loss.collated([i]).items()) for i in dict.fromkeys(some)]
    values = [[k, str(v.tolist() if isinstance(v, Tensor) else v)] for row in rows for k, v in row]
    return {
        "number of samples": count,
        "data set": digest(values),
        "model": digest([parameters, entries]),
        "objective": f"{loss.objective}, {loss.token_reduction}, seed {loss.seed}",
        "batch size": batch_size,
    }


def first_entries(scored: dict[str, nn.Parameter]) -> list[list[int]]:
    """The first entries of each parameter or this rank's partition, as bits, since NaN differs from itself."""
    parts = [getattr(p, "ds_tensor", p).detach().reshape(-1)[:ENTRIES] for p in scored.values()]
    return [part.double().cpu().view(torch.int64).tolist() for part in parts]
