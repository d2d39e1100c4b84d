"""The Triton kernel: its checks in the interpreter and, where there is a GPU, on it; and life without Triton."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from irdscale.fisher import kernels, rules
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
    left_BTP, right_BTQ, total_PQ = torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.zeros(4, 5)
    assert not kernels.usable(left_BTP, right_BTQ, total_PQ)
    with pytest.raises(ValueError, match=r"^add_squared_products: found (device cpu; expected cuda|no triton; .*)$"):
        kernels.add_squared_products(left_BTP, right_BTQ, total_PQ)


def test_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from irdscale.fisher import kernels, rules
print(kernels.usable(torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.zeros(4, 5)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@needs_triton
def test_a_failing_kernel_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "_why_not", lambda *_: None)
    monkeypatch.setattr(kernels, "_tiles", lambda *_: kernels.HALF_TILES)
    monkeypatch.setattr(kernels, "_add", fail)
    left_BTP, right_BTQ, total_PQ = torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.zeros(4, 5)
    kernels._works.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [kernels.usable(left_BTP, right_BTQ, total_PQ) for _ in range(2)] == [False, False]
    kernels._works.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "Fisher squares go without their Triton kernel on cpu: Failed to find C compiler"
    ]


class _OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("tokens", "terms", "able", "taken"),
    [(4, 1, True, True), (4, 1, False, False), (1, 1, True, False), (4, 2, True, False)],
)
def test_rules_hand_over_one_uncast_product(
    tokens: int, terms: int, able: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(kernels, "usable", lambda *_: able)
    monkeypatch.setattr(kernels, "add_squared_products", lambda left, *_: calls.append(left.dtype))
    left_BTP = torch.ones(2, tokens, 3, dtype=torch.bfloat16).as_subclass(_OnGpu)
    term = rules.Outer(left_BTP, torch.ones(2, tokens, 5, dtype=torch.bfloat16))
    total_PQ = torch.zeros(3, 5)
    rules.add_squares([term] * terms, total_PQ, None, rules.Buffers())
    assert calls == ([torch.bfloat16] if taken else [])
    assert torch.equal(total_PQ, torch.full((3, 5), 0.0 if taken else 2.0 * (terms * tokens) ** 2))
