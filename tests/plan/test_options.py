"""The plan's own arguments, and GPUs by name."""

from __future__ import annotations

import pytest

from irdscale.errors import InputError
from irdscale.plan.hardware import GPUS, find_gpu
from irdscale.plan.options import split_options


def test_own_keys_and_others():
    given, rest = split_options(["nodes=2", "gpu=a100-40gb", "search.ratio=0.1", "tokens=512", "output=x"])
    assert given == {"nodes": 2, "gpu": "a100-40gb", "tokens": 512}
    assert rest == ["search.ratio=0.1", "output=x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["node=2"], r'node: unknown key \(did you mean "nodes"\?\); expected one of nodes, gpus_per_node, tokens'),
        (["gpus=2"], r"gpus: unknown key"),
        (["nodes=two"], r"nodes: found 'two'; expected a number of at least 1"),
        (["nodes=0"], r"nodes: found '0'; expected a number of at least 1"),
        (["nodes=1", "nodes=2"], r"nodes: given twice"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        split_options(arguments)


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
