"""GPUs that several jobs share: how many fit on one, what each may take of its memory, and how their kernels run.

Ray counts shares and shows each job its GPU; it keeps nobody from another's memory. CUDA runs the kernels of several
processes one after another, in slices of time, unless its Multi-Process Service (MPS) runs on the node.
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

GIB = 2**30
# Ray counts in ten-thousandths.
PARTS = 10_000
# What CUDA and its libraries take of a GPU for each process, beside all tensors.
CONTEXT = GIB // 2
# How long a node's GPU is waited for, which others may hold.
PROBE_S = 60.0


@dataclass(frozen=True)
class Card:
    """A node's GPU, as a job sees it.

    Attributes:
        memory: bytes, of all who use it.
        mps: whether CUDA's Multi-Process Service runs there.
    """

    host: str
    name: str
    memory: int
    mps: bool


def is_share(gpus: float) -> bool:
    """Whether it is a part of a GPU."""
    return 0 < gpus < 1


def _parts(share: float) -> int:
    # 0.29 x 10000 is a little less than 2900.
    return int(share * PARTS + 1e-6)


def counted(share: float) -> float:
    """The share that is asked of Ray: rounded down, so that three times 0.33334 fit as well as three thirds."""
    return _parts(share) / PARTS


def jobs_a_gpu(share: float) -> int:
    """How many jobs of this share one GPU has room for."""
    return PARTS // _parts(share)


def share_of(jobs: int) -> float:
    """The largest share of which a GPU has room for so many."""
    return PARTS // jobs / PARTS


def shared_turns(evaluations: int, at_once: int, beside: int) -> int:
    """How long evaluations take, in times of one that has its GPU alone, where `beside` of them share its speed.

    Args:
        at_once: evaluations that run at the same time, on all GPUs.
    """
    beside = min(beside, at_once)
    full, rest = divmod(evaluations, at_once)
    # Ray fills a GPU before it takes the next.
    return full * beside + min(rest, beside)


def tensors_room(share: float, memory: int) -> int:
    """Bytes that the tensors of a job may take of a GPU of `memory` bytes.

    Raises:
        InputError: the share is less than a process takes without any.
    """
    room = int(share * memory) - CONTEXT
    if room <= 0:
        raise InputError(
            f"search.ray.gpus_per_rank: found {share:g}, {share * memory / GIB:.2f} GiB of a GPU of {memory / GIB:.1f} "
            f"GiB; expected more than the {CONTEXT / GIB:g} GiB that CUDA takes for each process"
        )
    return room


@contextmanager
def kept_to(share: float) -> Iterator[None]:
    """Give this process no more of its GPU's memory than its share: one job does not starve the others.

    Raises:
        InputError: the share is less than a process takes without any tensor.
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
        # Of a GPU that failed the job says what went wrong.
        with suppress(RuntimeError):
            torch.cuda.set_per_process_memory_fraction(1.0)


def mps_runs() -> bool:
    """Whether CUDA's Multi-Process Service runs on this host: its daemon listens where the driver looks for it."""
    control = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps") / "control"
    # Of another type than the daemon's own, so that nothing reaches it.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(str(control))
        except OSError as error:
            # Of a daemon that has ended the file stays, and connections are refused.
            return error.errno == errno.EPROTOTYPE
    return True


def cards(share: float) -> list[Card]:
    """One GPU of each node of the cluster; of nodes whose GPUs are busy, or that have none in truth, none."""
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
            # What is wrong there, a trial says.
            continue
        if card is not None:
            found.append(card)
    return found


def _card() -> Card | None:
    """The GPU that Ray shows this process; None where it has one by name only."""
    import torch

    if not torch.cuda.is_available():
        return None
    return Card(socket.gethostname(), torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], mps_runs())
