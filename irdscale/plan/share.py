"""Trials that share a GPU: whether their memory does, before any of them starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from irdscale.cluster.share import CONTEXT, Card, jobs_a_gpu, share_of, tensors_room
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.plan import trial_peak
from irdscale.plan.sizes import GIB

# A plan may be wrong by so much; only what is beyond is refused.
PLAN_ERROR = 0.1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharing:
    """How trials share the GPUs of a cluster; ready for JSON by `facts`.

    Attributes:
        share: of a GPU, for each trial.
        trials: on one GPU at the same time.
        gpu, gpu_gib: the GPU with the least memory; None where no node shows one.
        mps: whether CUDA's Multi-Process Service runs on all nodes; None where no node shows a GPU.
        phase, trial_gib: the phase of a trial that takes the most, with what CUDA takes for a process; None if unknown.
        most: trials that one GPU has memory for; None if unknown.
        fits: whether `trials` do; None if unknown.
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

    def facts(self) -> dict[str, Any]:
        """All of it by name."""
        return asdict(self)


def sharing_of(config: RunConfig, share: float, cards: Sequence[Card], tokens: int | None = None) -> Sharing:
    """What trials take that share GPUs, against what these GPUs have.

    Args:
        share: of a GPU, for each trial.
        cards: as `irdscale.cluster.share.cards` finds them; without any nothing is checked.
        tokens: of the longest sample; `task.max_length` if None.

    Raises:
        InputError: so many trials take more than a GPU has, by more than a plan may be wrong.
    """
    trials = jobs_a_gpu(share)
    if not cards:
        return Sharing(share, trials)
    card, mps = min(cards, key=lambda one: one.memory), all(one.mps for one in cards)
    room, gpu_gib = tensors_room(share, card.memory), round(card.memory / GIB, 2)
    try:
        phase, needed = trial_peak(config, tokens)
    except Exception as unknown:  # a model that cannot be planned may be searched all the same
        why = " ".join(str(unknown).split())
        log.warning("search.ray.gpus_per_rank: whether %d trials fit on a GPU is not known: %s", trials, why)
        return Sharing(share, trials, card.name, gpu_gib, mps)
    most = int(card.memory // (needed + CONTEXT))
    if needed > (1 + PLAN_ERROR) * room:
        expected = f"at least {share_of(most):g}, for {most} trials" if most > 1 else "1"
        raise InputError(
            f"search.ray.gpus_per_rank: found {share:g}, {trials} trials of {(needed + CONTEXT) / GIB:.1f} GiB "
            f"each on a GPU of {gpu_gib:.1f} GiB ({card.name} of {card.host}); expected {expected}"
        )
    trial_gib = round((needed + CONTEXT) / GIB, 2)
    return Sharing(share, trials, card.name, gpu_gib, mps, phase, trial_gib, most, needed <= room)


def said_of(sharing: Sharing) -> str:
    """One line for people."""
    parts = [f"up to {sharing.trials} trial(s) share a GPU"]
    if sharing.mps is not None:
        parts[0] += (
            " by CUDA MPS" if sharing.mps else " by time slices (start nvidia-cuda-mps-control -d on its node for MPS)"
        )
    if sharing.trial_gib is not None:
        said = f"a trial takes {sharing.trial_gib} GiB as planned, {sharing.share * (sharing.gpu_gib or 0):.1f} GiB are"
        parts.append(f"{said} its share of {sharing.gpu}, and {sharing.most} trials would fit")
        if not sharing.fits:
            parts.append("that is close: a trial that takes more than its share fails for want of memory")
    elif sharing.gpu is None:
        parts.append("their memory is not checked, for no node shows a GPU")
    return f"search.ray.gpus_per_rank={sharing.share:g}: {'; '.join(parts)}"
