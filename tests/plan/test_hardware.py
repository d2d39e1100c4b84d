"""GPUs by name."""

from __future__ import annotations

import pytest

from irdscale.errors import InputError
from irdscale.plan.hardware import GPUS, find_gpu


def test_unknown_gpu():
    with pytest.raises(
        InputError, match=r'gpu: found \'h100\' \(did you mean "h100-80gb"\?\); expected one of h100-80gb'
    ):
        find_gpu("h100", 1)


def test_room_and_links():
    gpu = find_gpu("h100-80gb", 8)
    assert gpu.room == 0.95 * 80 * 2**30 - 2 * 2**30
    assert (gpu.bandwidth(1), gpu.bandwidth(2)) == (0.7 * 450e9, 0.7 * 50e9)
    assert find_gpu("cpu", 1).room == 2 * find_gpu("cpu", 2).room
    assert {
        "h200-141gb",
        "a100-40gb",
        "a100-80gb",
        "l40s-48gb",
        "rtx4090-24gb",
        "l4-24gb",
        "a10g-24gb",
        "b200-180gb",
    } < set(GPUS)
