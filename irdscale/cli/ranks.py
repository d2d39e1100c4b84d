"""The ranks that a verb runs on: those that a launcher started, or those that Ray will start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from irdscale.distributed.process_group import in_process_group, launched
from irdscale.errors import InputError

if TYPE_CHECKING:
    from irdscale.config.schema import RunConfig


def rank_of_this_process() -> tuple[int, int, int]:
    """As `launched`, but a process whose launcher set no valid variables counts as the only rank."""
    try:
        return launched()
    except InputError:
        return 0, 0, 1


@contextmanager
def launched_ranks(settings: RunConfig, train: bool = True) -> Iterator[None]:
    """Run the body on all ranks that a launcher started, after checks that the configuration suits their number.

    Args:
        train: the ranks train together, which restricts batch sizes and ZeRO's settings.

    Raises:
        InputError: the configuration does not suit the number of ranks, or differs between them.
    """
    from irdscale.distributed.deepspeed import micro_batch, zero_settings

    world = launched()[2]
    if train:
        micro_batch(settings, world)
    zero = zero_settings(settings, world if train else None)
    with in_process_group(settings.distributed, always=zero is not None):
        if world > 1:
            from irdscale.config.loader import settings_of_ranks
            from irdscale.distributed.ranks import same_on_every_rank

            same_on_every_rank(settings_of_ranks(settings, zero))
        yield


@contextmanager
def candidate_ranks(settings: RunConfig) -> Iterator[None]:
    """Run a search or a comparison: on the launched ranks, or alone where `search.runner: ray` starts the ranks.

    Raises:
        InputError: as `launched_ranks`; or a launcher started several ranks beside Ray.
    """
    if settings.search.runner == "ray":
        _check_ray_ranks(settings)
        yield
    else:
        with launched_ranks(settings):
            yield


def _check_ray_ranks(settings: RunConfig) -> None:
    from irdscale.distributed.deepspeed import micro_batch, zero_settings

    world = launched()[2]
    if world > 1:
        raise InputError(f"found ray and {world} ranks (WORLD_SIZE)", "no launcher, or local", "search.runner")
    ray = settings.search.ray
    training = [ray.ranks]
    if settings.fisher.head_warmup and ray.fisher_ranks is not None:
        training.append(ray.fisher_ranks)
    for ranks in training:
        micro_batch(settings, ranks)
        zero_settings(settings, ranks)
