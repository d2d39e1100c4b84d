"""Fisher passes that make masks, for every verb: the model and samples they score, and what an earlier run kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import broadcast_flag, failing_together
from irdscale.distributed.zero3 import numel_of
from irdscale.errors import InputError
from irdscale.fisher.passes import SampleGradients
from irdscale.fisher.pool import draw_samples, mask_size, ranked_entries, sample_gradients
from irdscale.masks.mask import Mask
from irdscale.training.head_warmup import model_to_score

if TYPE_CHECKING:
    from irdscale.tasks import Task

T = TypeVar("T")


@dataclass(frozen=True)
class MaskPass:
    """Drawn samples, ready for Fisher passes.

    Attributes:
        samples: per-sample gradients of the drawn samples.
        places: their positions in the population.
        k: entries of the mask that `search.ratio` asks for.
        parameters, scored, head: entries of the model, of its scored parameters and of those trained outside the mask.
    """

    samples: SampleGradients
    places: list[int]
    k: int
    parameters: int
    scored: int
    head: int
    started: float

    def facts(self) -> dict[str, Any]:
        """Sizes for a result, sample gradients taken and seconds so far."""
        return {
            "parameters": self.parameters,
            "scored": self.scored,
            "sample_gradients": self.samples.taken,
            "seconds": round(time.perf_counter() - self.started, 2),
        }


@contextmanager
def mask_pass(config: RunConfig, task: Task, count: int, purpose: str, progress: bool) -> Iterator[MaskPass]:
    """Draw samples and load the model that scores them, for the body; collective.

    Args:
        count, purpose: number of samples, and the name of their draw.

    Raises:
        InputError: the configuration does not fit the data or the model.
    """
    started = time.perf_counter()
    with model_to_score(config, task, progress) as (model, dense):
        with failing_together():
            places = draw_samples(config, task, count, purpose)
            samples = sample_gradients(config, task, model, places, dense)
            sizes = {name: numel_of(parameter) for name, parameter in model.named_parameters()}
            scored = sum(map(numel_of, samples.scored.values()))
            head = sum(sizes[name] for name in dense)
            k = mask_size(config, model, scored, head)
        yield MaskPass(samples, places, k, sum(sizes.values()), scored, head, started)


def make_mask(
    config: RunConfig,
    task: Task,
    count: int,
    purpose: str,
    state: str,
    progress: bool,
    k: int | None = None,
    traces: Tensor | None = None,
) -> tuple[Mask, MaskPass]:
    """One mask of the largest scores over drawn samples; collective.

    Args:
        state: name of the pass's saved state.
        k: mask entries; as `search.ratio` asks if None.
        traces: float64 [count], filled with the samples' Fisher traces if given.
    """
    with mask_pass(config, task, count, purpose, progress) as drawn:
        k = drawn.k if k is None else k
        found = ranked_entries(config, drawn.samples, range(count), [count], k, state, traces=traces, progress=progress)
        return found[count].prefix(k), drawn


def kept_earlier(file: Path, find: Callable[[], T | None]) -> T | None:
    """What an earlier run kept, on every rank; None if it kept nothing. Collective.

    Args:
        file: file without which there is nothing to find.

    Raises:
        InputError: a file is damaged, or only some ranks have it.
    """
    with failing_together():
        found = find() if file.exists() else None
    if broadcast_flag(found is not None) and found is None:
        raise InputError("not found on this rank", "an output folder that all ranks share", where=file)
    return found
