"""The Triton kernel: its checks in the interpreter and, where there is a GPU, on it; and life without Triton."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from irdscale.sparse import kernels
from irdscale.sparse.products import prepare
from tests.kernels import needs_triton, run_checks

CHECKS = Path(__file__).with_name("kernel_checks.py")


@needs_triton
def test_in_the_interpreter() -> None:
    run_checks(CHECKS, interpret=True)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu() -> None:
    run_checks(CHECKS, interpret=False)


def test_not_on_a_cpu() -> None:
    left, right, index = torch.ones(3, 4), torch.ones(3, 5), torch.tensor([1, 7])
    assert not kernels.usable(left, right)
    with pytest.raises(ValueError, match=r"^tile_entries: found (device cpu; expected cuda|no triton; .*)$"):
        kernels.tile_entries(left, right, index, kernels.make_tiles(index // 5, index % 5, 5))
    assert torch.equal(prepare(index, (4, 5), "tiles").entries(left, right, index), torch.tensor([3.0, 3.0]))


def test_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from irdscale.sparse import kernels
print(kernels.usable(torch.ones(2, 3), torch.ones(2, 4)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@needs_triton
def test_a_failing_kernel_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "_why_not", lambda *_: None)
    monkeypatch.setattr(kernels, "_entries", fail)
    left, right = torch.ones(2, 4), torch.ones(2, 5)
    kernels._works.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [kernels.usable(left, right) for _ in range(2)] == [False, False]
    kernels._works.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "Sparse gradients go without their Triton kernel on cpu: Failed to find C compiler"
    ]
