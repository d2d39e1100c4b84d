"""Check whether the memory of trials that share a GPU fits, before any trial starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from irdscale.cluster.share import CONTEXT, Card, jobs_a_gpu, share_of, tensors_room
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.memory.phases import trial_phases
from irdscale.memory.workload import workload_of
from irdscale.utils.formats import GIB, counted, gib, percent, size

# Relative error of an estimate; only trials that exceed their share by more are refused.
ESTIMATE_ERROR = 0.1
# Bytes of the GPU in an estimate. They only limit how many tokens' logits are formed at once.
GPU_MEMORY = 80 * GIB
# Most trials on one GPU with `search.ray.gpus_per_rank: auto`; each more gains less.
AUTO_TRIALS = 8
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharing:
    """How trials share the GPUs of a cluster, as plain numbers and texts for JSON.

    Attributes:
        share: share of a GPU per trial.
        trials: trials on one GPU at the same time.
        gpu, gpu_gib: name and GiB of the GPU with the least memory; None if no node shows a GPU.
        mps: whether CUDA's Multi-Process Service runs on all nodes; None if no node shows a GPU.
        phase, trial_gib: a trial's phase with the largest peak, and its GiB including CUDA's context; None if unknown.
        most: trials that fit in the memory of one GPU; None if unknown.
        fits: whether `trials` fit; None if unknown.
    """

    share: float
    trials: int
    gpu: str | None = None
    gpu_gib: float | None = None
    mps: bool | None = None
    phase: str | None = None
    trial_gib: float | None = None
    most: int | None = None
    fits: bool | None = None


def sharing_of(
    config: RunConfig, share: float, cards: Sequence[Card], tokens: int | None = None, ratio: float | None = None
) -> Sharing:
    """Compare the memory of trials that share GPUs with the memory of these GPUs.

    Args:
        share: share of a GPU per trial.
        cards: GPUs from `irdscale.cluster.share.cards`; without GPUs, nothing is checked.
        tokens: length of the longest sample; `task.max_length` if None.
        ratio: share of the parameters that the largest training trains, if larger than `search.ratio`. Only a warning
            says that this training exceeds its share, because a dense training takes less than a mask of its size.

    Raises:
        InputError: the trials exceed the GPU's memory by more than the estimate's error.
    """
    trials = jobs_a_gpu(share)
    if not cards:
        return Sharing(share, trials)
    card, mps = min(cards, key=lambda one: one.memory), all(one.mps for one in cards)
    room, gpu_gib = tensors_room(share, card.memory), round(card.memory / GIB, 2)
    try:
        phase, needed = trial_peak(config, tokens)
        most_needed = needed if ratio is None else trial_peak(_with_ratio(config, ratio), tokens)[1]
    except Exception as unknown:  # the search can run without this estimate
        why = " ".join(str(unknown).split())
        log.warning("search.ray.gpus_per_rank: whether %d trials fit on a GPU is not known: %s", trials, why)
        return Sharing(share, trials, card.name, gpu_gib, mps)
    most = int(card.memory // (needed + CONTEXT))
    if needed > (1 + ESTIMATE_ERROR) * room:
        expected = f"at least {share_of(most):g}, for {most} trials" if most > 1 else "1"
        found = (
            f"found {share:g}, {trials} trials of {size(needed + CONTEXT)} each on a GPU of "
            f"{gib(gpu_gib)} ({card.name} of {card.host})"
        )
        raise InputError(found, expected, key="search.ray.gpus_per_rank")
    if most_needed > max(needed, room):
        what = "search.ray.gpus_per_rank: a training of %s of the parameters needs up to %s, and its share is %s"
        log.warning(what, percent(ratio or 0), size(most_needed + CONTEXT), size(share * card.memory))
    trial_gib = round((needed + CONTEXT) / GIB, 2)
    return Sharing(share, trials, card.name, gpu_gib, mps, phase, trial_gib, most, needed <= room)


def share_by_memory(
    config: RunConfig, cards: Sequence[Card], tokens: int | None = None, ratio: float | None = None
) -> float:
    """The GPUs of a trial with which as many trials as fit share a GPU; 1 if only one fits, or nothing is known.

    Args:
        ratio: share of the parameters that the largest training trains; `search.ratio` if None.
    """
    try:
        needed = trial_peak(_with_ratio(config, ratio), tokens)[1] * (1 + ESTIMATE_ERROR) + CONTEXT
    except Exception as unknown:  # each trial has a GPU alone
        log.warning("search.ray.gpus_per_rank: how many trials fit is not known: %s", " ".join(str(unknown).split()))
        return 1
    most = min((int(card.memory // needed) for card in cards), default=1)
    return share_of(min(most, AUTO_TRIALS)) if most > 1 else 1


def _with_ratio(config: RunConfig, ratio: float | None) -> RunConfig:
    if ratio is None:
        return config
    return config.model_copy(update={"search": config.search.model_copy(update={"ratio": ratio})})


def trial_peak(config: RunConfig, tokens: int | None = None) -> tuple[str, int]:
    """A trial's phase with the largest peak on a GPU, and a rank's bytes of tensors in it.

    Args:
        tokens: length of the longest sample; `task.max_length` if None.

    Raises:
        InputError: there is no such model, or the configuration does not fit it.
    """
    found = trial_phases(*workload_of(config, 1, config.search.ray.ranks, GPU_MEMORY, tokens))
    phase = max(found, key=lambda name: found[name].total)
    return phase, found[phase].total


def describe(sharing: Sharing) -> str:
    """One line on how trials share GPUs, and whether they fit."""
    parts = [f"up to {counted(sharing.trials, 'trial')} may share a GPU"]
    if sharing.mps is not None:
        parts[0] += (
            " by CUDA MPS" if sharing.mps else " by time slices (start nvidia-cuda-mps-control -d on its node for MPS)"
        )
    if sharing.trial_gib is not None:
        room = f"its share of {sharing.gpu} is {gib(sharing.share * (sharing.gpu_gib or 0))}"
        parts.append(
            f"a trial needs an estimated {gib(sharing.trial_gib or 0)}, {room}, and {sharing.most} trials would fit"
        )
        if not sharing.fits:
            parts.append("this is close: a trial that exceeds its share runs out of memory")
    elif sharing.gpu is None:
        parts.append("their memory is not checked, because no node shows a GPU")
    return f"search.ray.gpus_per_rank={sharing.share:g}: {'; '.join(parts)}"
