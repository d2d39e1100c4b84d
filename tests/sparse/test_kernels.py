"""The Triton kernels: their checks in the interpreter and, where there is a GPU, on it; what they compile to.

And life without Triton.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.sparse import dots, kernels
from irdscale.sparse.products import Kind, prepare
from tests.kernels import ROOT, needs_triton, run_checks

CHECKS, COMPILE = Path(__file__).with_name("kernel_checks.py"), "tests.sparse.kernel_compile"
KERNELS: tuple[Kind, ...] = ("tiles", "dots")


@needs_triton
def test_in_the_interpreter() -> None:
    run_checks(CHECKS, interpret=True)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu() -> None:
    run_checks(CHECKS, interpret=False)


@needs_triton
def test_compiled_ahead_of_time() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(row["kernel"], row["architecture"]) for row in compiled} == set(product(("dots", "tiles"), (80, 89, 90)))
    for row in compiled:
        # 99 KiB are the least that a GPU with tensor cores for bfloat16 has.
        assert row["stack"] == 0, row
        assert row["shared"] <= 99 * 1024, row
        if row["kernel"] == "dots":
            # Numbers go from the L1 cache to the registers of the tensor cores, 16 bytes at once, and nowhere else.
            assert (row["shared"], row["barriers"]) == (0, 0), row
            assert (row["wide_loads"], row["products"]) == (4, 8), row
        else:
            assert row["wide_copies"] > 0, row


def test_not_on_a_cpu() -> None:
    left, right, index = torch.ones(3, 4), torch.ones(3, 5), torch.tensor([1, 7])
    assert not kernels.usable(left, right)
    with pytest.raises(ValueError, match=r"^tile_entries: found (device cpu; expected cuda|no triton; .*)$"):
        kernels.tile_entries(left, right, index, kernels.make_tiles(index // 5, index % 5, 5))
    assert not dots.usable(left, right)
    with pytest.raises(ValueError, match=r"^dot_entries: found (device cpu; expected cuda|no triton; .*)$"):
        dots.dot_entries(left, right, 2, dots.make_dots(index // 5, index % 5, (4, 5)))
    for kind in KERNELS:
        assert torch.equal(prepare(index, (4, 5), kind).entries(left, right, index), torch.tensor([3.0, 3.0]))


def test_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from irdscale.sparse import dots, kernels
print(kernels.usable(torch.ones(2, 3), torch.ones(2, 4)), dots.usable(torch.ones(2, 3), torch.ones(2, 4)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@needs_triton
@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        (kernels, "tile_entries", "Sparse gradients go without their Triton kernel on cpu: Failed to find C compiler"),
        (
            dots,
            "dot_entries",
            "Scattered sparse gradients go without their Triton kernel on cpu: Failed to find C compiler",
        ),
    ],
)
def test_a_failing_kernel_is_logged_once(
    module: Any, name: str, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(module, "why_not", lambda *_: None)
    monkeypatch.setattr(module, name, fail)
    left, right = torch.ones(2, 4), torch.ones(2, 5)
    module._works.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [module.usable(left, right) for _ in range(2)] == [False, False]
    module._works.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [what]


@pytest.mark.parametrize(
    ("starts", "bound", "expected"),
    [
        ((0, 2, 4, 6, 8), 80, [(0, 4)]),
        ((0, 2, 4, 6, 8), 79, [(0, 2), (2, 4)]),
        ((0, 6, 7, 8, 9), 70, [(0, 2), (2, 4)]),
        # One chunk alone may pass the bound.
        ((0, 6, 7, 8, 9), 50, [(0, 1), (1, 2), (2, 3), (3, 4)]),
    ],
)
def test_partial_sums_are_bounded(
    starts: tuple[int, ...], bound: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dots, "PARTIALS", bound)
    assert dots._launches(starts, 10) == expected


@pytest.mark.parametrize(
    ("programs", "chunks", "splits"), [(128, 32, 1), (16, 32, 8), (1, 4, 4), (157, 32, 4), (264, 32, 1)]
)
def test_programs_fill_the_gpu(programs: int, chunks: int, splits: int) -> None:
    assert dots._splits(programs, chunks, 132) == splits
