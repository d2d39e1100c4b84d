"""Shares of a GPU: how many jobs fit on one GPU, and how much of its memory each may use.

Ray counts shares and assigns GPUs, but does not limit memory. CUDA time-slices the kernels of several processes, unless
its Multi-Process Service (MPS) runs on the node.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from irdscale.errors import InputError
from irdscale.utils.formats import GIB, size

# Ray counts resources in units of 1/10000.
PARTS = 10_000
# Bytes of GPU memory that CUDA and its libraries take per process, beside tensors.
CONTEXT = GIB // 2
# Time to wait for a node's GPU that other jobs hold.
PROBE_S = 60.0


@dataclass(frozen=True)
class Card:
    """A node's GPU as a job sees it.

    Attributes:
        memory: total bytes.
        mps: whether CUDA's Multi-Process Service runs on the node.
    """

    host: str
    name: str
    memory: int
    mps: bool


def is_share(gpus: float) -> bool:
    """Whether a number of GPUs is a share of one."""
    return 0 < gpus < 1


def _parts(share: float) -> int:
    # 0.29 x 10000 is a little less than 2900.
    return int(share * PARTS + 1e-6)


def counted(share: float) -> float:
    """The share requested from Ray, rounded down so that 3 x 0.33334 fit on one GPU."""
    return _parts(share) / PARTS


def jobs_a_gpu(share: float) -> int:
    """How many jobs with this share fit on one GPU."""
    return PARTS // _parts(share)


def share_of(jobs: int) -> float:
    """The largest share with which so many jobs fit on one GPU."""
    return PARTS // jobs / PARTS


def shared_turns(evaluations: int, at_once: int, beside: int) -> int:
    """Duration of evaluations that share GPUs, in units of one evaluation with a GPU to itself.

    Args:
        at_once: evaluations at the same time on all GPUs.
        beside: evaluations that share one GPU and its speed.
    """
    beside = min(beside, at_once)
    full, rest = divmod(evaluations, at_once)
    # Ray fills one GPU before it uses the next.
    return full * beside + min(rest, beside)


def tensors_room(share: float, memory: int) -> int:
    """Bytes for the tensors of a job with this share of a GPU with `memory` bytes.

    Raises:
        InputError: the share is smaller than CUDA's context.
    """
    room = int(share * memory) - CONTEXT
    if room <= 0:
        fault = f"found {share:g}, {size(share * memory)} of a GPU of {size(memory)}"
        expected = f"more than the {size(CONTEXT)} that CUDA takes per process"
        raise InputError(fault, expected, key="search.ray.gpus_per_rank")
    return room


@contextmanager
def kept_to(share: float) -> Iterator[None]:
    """Limit this process to its share of GPU memory in the body.

    Raises:
        InputError: the share is smaller than CUDA's context.
    """
    if not is_share(share):
        yield
        return
    import torch

    if not torch.cuda.is_available():
        yield
        return
    memory = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(tensors_room(share, memory) / memory)
    try:
        yield
    finally:
        # On a failed GPU the job's own error says what went wrong.
        with suppress(RuntimeError):
            torch.cuda.set_per_process_memory_fraction(1.0)


def mps_runs() -> bool:
    """Whether CUDA's Multi-Process Service runs on this host: its daemon listens on the driver's socket."""
    control = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps") / "control"
    # A socket of another type than the daemon's, so the probe does not reach it.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(str(control))
        except OSError as error:
            # The file of a daemon that has ended stays, and refuses connections.
            return error.errno == errno.EPROTOTYPE
    return True


def cards(share: float) -> list[Card]:
    """One GPU per node of the cluster, without nodes whose GPUs are busy or exist in Ray's count only."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from irdscale.cluster.connect import nodes

    probe = ray.remote(num_cpus=0, num_gpus=share, max_calls=1, max_retries=0)(_card)
    asked = [
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["id"], soft=False)).remote()
        for node in nodes()
        if node["has"].get("GPU", 0)
    ]
    answered, busy = ray.wait(asked, num_returns=len(asked), timeout=PROBE_S) if asked else ([], [])
    for ref in busy:
        ray.cancel(ref, force=True)
    found = []
    for ref in answered:
        try:
            card = ray.get(ref)
        except ray.exceptions.RayError:
            # A trial will report what is wrong there.
            continue
        if card is not None:
            found.append(card)
    return found


def _card() -> Card | None:
    """The GPU that Ray assigned to this process; None if CUDA sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return Card(socket.gethostname(), torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], mps_runs())
