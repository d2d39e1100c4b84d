"""Shares of a GPU: how many fit, what a process may take of the memory, and whether CUDA's MPS is seen to run."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.cluster import connect, share
from irdscale.cluster.share import GIB, counted, jobs_a_gpu, kept_to, mps_runs, share_of, shared_turns, tensors_room
from irdscale.cluster.worker import RankGroup
from irdscale.errors import InputError


@pytest.mark.parametrize(
    ("asked", "jobs"),
    [
        (0.25, 4),
        (0.1, 10),
        (0.2, 5),
        (1 / 3, 3),
        (0.33, 3),
        (0.33334, 3),
        (0.16667, 6),
        (0.4, 2),
        (0.29, 3),
        (0.5001, 1),
        (0.0001, 10_000),
        (0.9999, 1),
        (1, 1),
    ],
)
def test_so_many_jobs_fit_on_one_gpu(asked: float, jobs: int) -> None:
    """Added up one after the other, without floating-point error."""
    part, number = Fraction(counted(asked)).limit_denominator(10_000), 0
    while (number + 1) * part <= 1:
        number += 1
    assert number == jobs_a_gpu(asked) == jobs
    assert asked - 0.0001 < counted(asked) <= asked


def test_the_share_of_so_many_jobs_has_room_for_them() -> None:
    for jobs in range(1, 101):
        assert jobs_a_gpu(share_of(jobs)) == jobs
        assert share_of(jobs) * jobs <= 1


def test_what_is_left_of_two_gpus_makes_no_third_place(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 1.0}, {"CPU": 4.0}]
    monkeypatch.setattr(connect, "nodes", lambda: [{"id": "", "host": "", "has": has} for has in found])
    # Of the second node the processors are the limit.
    assert [connect.fitting(RankGroup(gpus=gpus)) for gpus in (0, 1, 0.5, 0.4, 0.25, 0.1)] == [23, 3, 6, 6, 11, 19]


@pytest.mark.parametrize("beside", [1, 2, 4])
@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_time_of_evaluations_that_share_gpus(gpus: int, beside: int) -> None:
    """Against filling one GPU after another, wave by wave; the fullest GPU of a wave ends last."""
    for evaluations in range(1, 30):
        left, expected = evaluations, 0
        while left:
            on = [0] * gpus
            for gpu in range(gpus):
                while left and on[gpu] < beside:
                    on[gpu] += 1
                    left -= 1
            expected += max(on)
        assert shared_turns(evaluations, gpus * beside, beside) == expected
    # Fewer at once than a GPU has room for.
    assert shared_turns(5, 2, 4) == 5


class Cuda:
    """In the place of torch.cuda, with a GPU of 80 GiB."""

    def __init__(self, available: bool = True) -> None:
        self.available, self.limits = available, list[float]()

    def is_available(self) -> bool:
        return self.available

    def mem_get_info(self) -> tuple[int, int]:
        assert self.available
        return 70 * GIB, 80 * GIB

    def set_per_process_memory_fraction(self, fraction: float) -> None:
        assert self.available
        self.limits.append(fraction)

    def get_device_name(self) -> str:
        return "H"


def test_a_process_is_kept_to_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    with kept_to(0.25):
        # A quarter of 80 GiB, without what CUDA itself takes: four such and their contexts are no more than the GPU.
        assert cuda.limits == [19.5 / 80]
    assert cuda.limits == [19.5 / 80, 1.0]
    with pytest.raises(ZeroDivisionError), kept_to(0.5):
        raise ZeroDivisionError
    assert cuda.limits[2:] == [39.5 / 80, 1.0]
    with (
        pytest.raises(InputError, match=r"^search.ray.gpus_per_rank: found 0.005, 0.40 GiB of .* 80.0 GiB; expected"),
        kept_to(0.005),
    ):
        pass


@pytest.mark.parametrize(("gpus", "available"), [(0, True), (1, True), (0.25, False)])
def test_who_has_a_gpu_alone_or_none_is_not_limited(
    monkeypatch: pytest.MonkeyPatch, gpus: float, available: bool
) -> None:
    cuda = Cuda(available)
    monkeypatch.setattr(torch, "cuda", cuda)
    with kept_to(gpus):
        assert not cuda.limits


def test_room_of_all_and_their_contexts_is_no_more_than_the_gpu() -> None:
    for jobs in (1, 2, 3, 7):
        assert jobs * (tensors_room(share_of(jobs), 16 * GIB) + share.CONTEXT) <= 16 * GIB


def test_a_card_is_what_a_job_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", Cuda())
    monkeypatch.setattr(share, "mps_runs", lambda: True)
    assert share._card() == share.Card(socket.gethostname(), "H", 80 * GIB, True)
    monkeypatch.setattr(torch, "cuda", Cuda(available=False))
    assert share._card() is None


@pytest.fixture
def pipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the driver looks for MPS; a short path, as sockets want it."""
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", folder)
        yield Path(folder)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_mps_runs_where_its_daemon_listens(pipes: Path, kind: Any) -> None:
    assert not mps_runs()
    daemon = socket.socket(socket.AF_UNIX, kind)
    try:
        daemon.bind(str(pipes / "control"))
        if kind != socket.SOCK_DGRAM:
            daemon.listen(1)
        assert mps_runs()
        if kind != socket.SOCK_DGRAM:
            daemon.settimeout(0)
            # Nobody has come to it.
            with pytest.raises(BlockingIOError):
                daemon.accept()
    finally:
        daemon.close()
    # The file stays when a daemon ends.
    assert (pipes / "control").exists()
    assert not mps_runs()


def test_no_mps_where_another_file_has_its_place(pipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pipes / "control").touch()
    assert not mps_runs()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(pipes / ("x" * 200)))
    assert not mps_runs()
