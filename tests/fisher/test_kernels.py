"""The Triton kernel in the interpreter and on a GPU if there is one, and the package without Triton."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from irdscale.fisher import kernels, squares
from irdscale.fisher.terms import Outer
from tests.kernels import INTERPRETED, ROOT, needs_triton, run_checks

CHECKS = Path(__file__).with_name("kernel_checks.py")
# Bytes that a program can have: of the H100 and B200, the A100, and the RTX 3090, L4 and RTX 4090.
SHARED_MEMORY = {90: 227 * 1024, 100: 227 * 1024, 80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024}


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
from irdscale.fisher import kernels, squares
print(kernels.usable(torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.zeros(4, 5)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@needs_triton
def test_a_failing_kernel_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "_why_not", lambda *_: None)
    monkeypatch.setattr(kernels, "_tiles", lambda *_: (kernels.FLOAT, 1))
    monkeypatch.setattr(kernels, "_add", fail)
    left_BTP, right_BTQ, total_PQ = torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.zeros(4, 5)
    kernels._works.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [kernels.usable(left_BTP, right_BTQ, total_PQ) for _ in range(2)] == [False, False]
    kernels._works.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "Fisher squares go without their Triton kernel on cpu: Failed to find C compiler"
    ]


@needs_triton
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    """Each kernel fits its card's registers and shared memory, multiplies on tensor cores, and copies ahead."""
    cases = [f"bfloat16:{capability}:large" for capability in (80, 89, 90, 100)]
    cases += [f"bfloat16:{capability}:small" for capability in (80, 90)]
    cases += ["float32:80:large", "float32:90:large", "float32:89:large", "float32:89:small"]
    cases += ["bfloat16:90:unaligned", "float32:80:unaligned"]
    command = [sys.executable, "-m", "tests.fisher.compiled_kernels", *cases]
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kernel["case"] for kernel in found] == cases
    for kernel in found:
        dtype, capability, kind = kernel["case"].split(":")
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[int(capability)], kernel
        # Elsewhere float32 is as fast without tensor cores.
        assert (kernel["mma"] > 0) == ((dtype, capability) != ("float32", "89")), kernel
        assert (kernel["wgmma"] > 0) == (capability == "90"), kernel
        if kind != "unaligned":
            assert kernel["copies"] > 0, kernel
            assert kernel["prefetch"] > 0, kernel


Launch = tuple[tuple[Any, ...], dict[str, Any]]


class _Recorder:
    """Takes launches in the kernel's place, by the sizes that it is asked for."""

    def __init__(self, aligned: bool, launches: list[tuple[bool, Launch]]) -> None:
        self.aligned, self.launches = aligned, launches

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *arguments, **options: self.launches.append((self.aligned, (arguments, options)))


def _specializations(launches: list[tuple[bool, Launch]], jitted: Any) -> set[str]:
    """What Triton would compile for, launch by launch."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    found = set()
    for aligned, (arguments, options) in launches:
        kernel = jitted(aligned)
        bind = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))
        _, specialization, rest = bind(*arguments, **options)
        found.add(f"{specialization} {sorted(rest.items())}")
    return found


@needs_triton
def test_few_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for a data type and tile, whatever the sizes, and the check of the first use compiles no other."""
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    launches: list[tuple[bool, Launch]] = []
    jitted = kernels._jitted
    monkeypatch.setattr(kernels, "_jitted", lambda aligned: _Recorder(aligned, launches))
    monkeypatch.setattr(kernels, "_why_not", lambda *_: None)
    monkeypatch.setattr(kernels, "_tiles", lambda dtype, _: (kernels._tiles_of(dtype, (9, 0)), 8))

    def add(batch: int, tokens: int, rows: int, columns: int, dtype: torch.dtype, **strange: int) -> None:
        # Memory is taken by no one: only addresses and strides count.
        left_BTP = torch.empty(batch, tokens, rows + strange.get("padding", 0), dtype=dtype)[..., :rows]
        right_BTQ, total_PQ = torch.empty(batch, tokens, columns, dtype=dtype), torch.empty(rows, columns)
        kernels.usable(left_BTP, right_BTQ, total_PQ)
        for trace_B in (None, torch.zeros(batch, dtype=torch.float64)):
            kernels.add_squared_products(left_BTP, right_BTQ, total_PQ, trace_B)

    def compiled() -> int:
        return len(_specializations(launches, jitted))

    kernels._works.cache_clear()
    add(1, 1, 768, 512, torch.bfloat16)
    assert (len(launches), compiled()) == (3, 1)
    for shape in ((8, 512, 2048, 768), (4, 100, 1024, 4096), (32, 77, 528, 1040), (1, 64, 2048, 2048)):
        add(*shape, torch.bfloat16)
    add(3, 77, 768, 528, torch.bfloat16, padding=64)
    assert compiled() == 1
    for rows in (16, 32, 48, 64):
        add(2, 5, rows, 768, torch.bfloat16)
    assert compiled() == 2
    for batch, tokens, rows, columns in ((1, 1, 1, 1), (4, 16, 2, 768), (5, 7, 21, 9), (2, 2, 768, 1), (3, 8, 300, 30)):
        add(batch, tokens, rows, columns, torch.bfloat16)
        add(batch, tokens, rows, columns, torch.bfloat16, padding=3)
    assert compiled() == 3
    add(8, 512, 2048, 768, torch.float32)
    add(8, 512, 32, 768, torch.float32)
    assert compiled() == 4
    kernels._works.cache_clear()


@pytest.mark.parametrize(
    ("rows", "columns", "aligned", "chosen"),
    [
        (8192, 2048, True, "large"),
        (2048, 2048, True, "large"),
        (14336, 4096, True, "large"),
        (768, 3072, True, "large"),
        # A large tile would leave more than half of 132 processors without work.
        (768, 768, True, "small"),
        (64, 65536, True, "small"),
        (65536, 32, True, "small"),
        (8191, 2048, False, "unaligned"),
    ],
)
def test_tiles_are_chosen_by_rule(rows: int, columns: int, aligned: bool, chosen: str) -> None:
    tiles = kernels._tiles_of(torch.bfloat16, (9, 0))
    assert kernels._tile(tiles, rows, columns, aligned, 132) == getattr(tiles, chosen)


def _rounded(x: Tensor) -> Tensor:
    """To TF32: 10 bits of mantissa, halves away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _three_products(left_TP: Tensor, right_TQ: Tensor, step: int) -> Tensor:
    """What tf32x3 computes: products of large and small parts, summed in float32 for each step of tokens."""
    left, right = _rounded(left_TP), _rounded(right_TQ)
    small_left, small_right = _rounded(left_TP - left), _rounded(right_TQ - right)
    total_PQ = torch.zeros(left_TP.shape[1], right_TQ.shape[1])
    for start in range(0, len(left_TP), step):
        part_PQ = torch.zeros_like(total_PQ)
        for a_TP, b_TQ in ((small_left, right), (left, small_right), (left, right)):
            for a_P, b_Q in zip(a_TP[start : start + step], b_TQ[start : start + step], strict=True):
                # Two mantissas of 11 bits multiply without rounding.
                part_PQ = part_PQ + torch.outer(a_P, b_Q)
        total_PQ = total_PQ + part_PQ
    return total_PQ


def _plain_product(left_TP: Tensor, right_TQ: Tensor) -> Tensor:
    """A float32 sum, token by token, of products that are added before they are rounded."""
    total_PQ = torch.zeros(left_TP.shape[1], right_TQ.shape[1], dtype=torch.float64)
    for left_P, right_Q in zip(left_TP.double(), right_TQ.double(), strict=True):
        total_PQ = (total_PQ + torch.outer(left_P, right_Q)).float().double()
    return total_PQ


@pytest.mark.parametrize("tokens", [32, 512, 2048])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e-30])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_three_products_are_as_exact_as_float32(tokens: int, scale: float, mean: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    left_TP = (torch.randn(tokens, 40, generator=generator) + mean) * scale
    right_TQ = torch.randn(tokens, 40, generator=generator) + mean
    expected_PQ = left_TP.double().t() @ right_TQ.double()

    def error(found_PQ: Tensor) -> float:
        return float((found_PQ.double() - expected_PQ).square().mean().sqrt() / expected_PQ.abs().max())

    step = kernels.FLOAT_ON_TENSOR_CORES.large.block_t
    three, plain = error(_three_products(left_TP, right_TQ, step)), error(_plain_product(left_TP, right_TQ))
    assert three < 1.05 * plain
    if tokens > 32:
        assert three < 0.7 * plain
    assert error(_rounded(left_TP).t() @ _rounded(right_TQ)) > 10 * plain


class _OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("tokens", "count", "able", "taken"),
    [(4, 1, True, True), (4, 1, False, False), (1, 1, True, False), (4, 2, True, False)],
)
def test_squares_hand_over_one_uncast_product(
    tokens: int, count: int, able: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(kernels, "usable", lambda *_: able)
    monkeypatch.setattr(kernels, "add_squared_products", lambda left, *_: calls.append(left.dtype))
    left_BTP = torch.ones(2, tokens, 3, dtype=torch.bfloat16).as_subclass(_OnGpu)
    term = Outer(left_BTP, torch.ones(2, tokens, 5, dtype=torch.bfloat16))
    total_PQ = torch.zeros(3, 5)
    squares.add_squares([term] * count, total_PQ, None, squares.Buffers())
    assert calls == ([torch.bfloat16] if taken else [])
    assert torch.equal(total_PQ, torch.full((3, 5), 0.0 if taken else 2.0 * (count * tokens) ** 2))
