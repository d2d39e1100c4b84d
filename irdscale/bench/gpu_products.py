"""The kernels on a GPU: squares of samples' gradients, entries of a weight's gradient, and compilation times.

The squares are compared with cuBLAS' weight gradient of the full batch, which has as many multiply-adds and no squares.

    python -m irdscale.bench.gpu_products     seconds of all kernels' first and second call in this process, as JSON
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from irdscale.bench import gpu_models
from irdscale.bench.gpu_models import SIZES, synchronised, wait
from irdscale.bench.timing import figure, row, side_by_side
from irdscale.errors import RunError
from irdscale.fisher import kernels
from irdscale.sparse import kernels as sparse_kernels
from irdscale.sparse.products import Kind, prepare

log = logging.getLogger(__name__)

SQUARES_BAR = 0.75
# Time of the way that `prepare` chooses over the fastest way's.
CHOICE_BAR = 1.15
COMPILE_BARS = {"empty": 3.0, "filled": 0.5}
REPEATS = 7
# Calls timed as one: a single call takes no longer than its launch.
CALLS = 20
COMPILE_TIMEOUT_S = 120
# The ways that run on a GPU.
KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "sampled")
# Share of entries, and of the rows and columns that hold them.
MASKS = {"0.5 % in 1/8 of rows and columns": (0.005, 1 / 8), "0.5 % scattered": (0.005, 1.0)}
MASKS["0.2 % scattered"] = (0.002, 1.0)


def squares_rows(name: str) -> Iterator[dict[str, Any]]:
    """cuBLAS' weight gradient of a batch over the squares' kernel: the kernel's speed relative to cuBLAS'."""
    size = SIZES[name]
    for p, q in size.shapes[:2] if name == next(iter(SIZES)) else size.shapes[1:2]:
        for dtype in (torch.bfloat16, torch.float32):
            left_BTP, right_BTQ = _draw(size.batch, p, dtype), _draw(size.batch, q, dtype)
            total_PQ = torch.zeros(p, q, device=gpu_models.DEVICE)
            if not kernels.usable(left_BTP, right_BTQ, total_PQ):
                log.warning("bench: the squares' kernel does not run here for %s; its rows are left out", dtype)
                continue
            gradient_PQ = torch.empty(p, q, device=gpu_models.DEVICE, dtype=dtype)
            left_NP, right_NQ = left_BTP.flatten(0, 1), right_BTQ.flatten(0, 1)
            measured: dict[str, Callable[[], object]] = {
                "cuBLAS": partial(torch.mm, left_NP.t(), right_NQ, out=gradient_PQ),
                "kernel": partial(kernels.add_squared_products, left_BTP, right_BTQ, total_PQ),
            }
            seconds = side_by_side(synchronised(measured, CALLS), REPEATS)
            what = f"cuBLAS weight gradient / squares kernel, {_matrix(p, q, dtype)}, {size.batch} samples"
            # float32 has no bar: both compute it without tensor cores.
            bar = SQUARES_BAR if dtype == torch.bfloat16 else None
            yield row("fisher", what, name, gpu_models.TOKENS, seconds, "cuBLAS", "kernel", at_least=bar)


def way_rows(name: str) -> Iterator[dict[str, Any]]:
    """The ways to compute k entries of a weight's gradient, each over `dense`, and the chosen one over the fastest."""
    size = SIZES[name]
    for p, q in size.shapes[:3]:
        left_NP, right_NQ = (_draw(size.batch, width, torch.bfloat16).flatten(0, 1) for width in (p, q))
        if not sparse_kernels.usable(left_NP, right_NQ):
            log.warning("bench: the kernels of sparse gradients do not run here; their rows are left out")
            return
        for where, (ratio, share) in MASKS.items():
            index = draw_entries(p, q, ratio, share)
            ways = {kind: prepare(index, (p, q), kind) for kind in KINDS}
            chosen = prepare(index, (p, q)).kind
            measured: dict[str, Callable[[], object]] = {
                kind: partial(way.entries, left_NP, right_NQ, index) for kind, way in ways.items()
            }
            seconds = side_by_side(synchronised(measured, CALLS), REPEATS)
            place = f"{_matrix(p, q, torch.bfloat16)}, {where}"
            for kind in KINDS[1:]:
                what = f"{kind} / {KINDS[0]}, {place}"
                yield row("train", what, name, gpu_models.TOKENS, seconds, kind, KINDS[0])
            best = min(KINDS, key=lambda kind: sum(seconds[kind]))
            what = f"chosen ({chosen}) / fastest ({best}), {place}"
            yield row("train", what, name, gpu_models.TOKENS, seconds, chosen, best, limit=CHOICE_BAR)


def draw_entries(p: int, q: int, ratio: float, share: float) -> Tensor:
    """Flat indices of random entries within the first rows and columns, int32, sorted."""
    p_active, q_active = max(1, int(p * share)), max(1, int(q * share))
    k = min(p_active * q_active, max(1, round(ratio * p * q)))
    chosen = torch.randperm(p_active * q_active, generator=torch.Generator().manual_seed(0))[:k].sort().values
    return (chosen // q_active * q + chosen % q_active).to(gpu_models.DEVICE, torch.int32)


def compile_rows(name: str) -> Iterator[dict[str, Any]]:
    """Excess of the kernels' first calls over the second, in a fresh process, with an empty and a filled Triton cache.

    Raises:
        RunError: the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="irdscale-triton-") as cache:
        for state, bar in COMPILE_BARS.items():
            found = _in_fresh_process(cache)
            what = f"tuning and compiling of all kernels in a fresh process, {state} cache, s"
            excess = max(0.0, found["first"] - found["second"])
            yield figure("fisher", what, name, gpu_models.TOKENS, excess, limit=bar)


def _in_fresh_process(cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "irdscale.bench.gpu_products"]
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=True
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"bench: compiling the kernels took more than {COMPILE_TIMEOUT_S} s") from None
    except subprocess.CalledProcessError as error:
        raise RunError(f"bench: compiling the kernels failed: {error.stderr.strip()[-300:]}") from None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def first_and_second_call() -> dict[str, float]:
    """Seconds of the first and the second call of all kernels, for the matrices of the first size, in this process."""
    size = next(iter(SIZES.values()))
    # Initialises the CUDA context and cuBLAS.
    ones = torch.ones(64, 64, device=gpu_models.DEVICE, dtype=torch.bfloat16)
    torch.mm(ones, ones)
    work = []
    for p, q in size.shapes:
        left_BTP, right_BTQ = _draw(size.batch, p, torch.bfloat16), _draw(size.batch, q, torch.bfloat16)
        total_PQ = torch.zeros(p, q, device=gpu_models.DEVICE)
        index = draw_entries(p, q, 0.002, 1.0)
        ways = [prepare(index, (p, q), kind) for kind in KINDS]
        work.append((left_BTP, right_BTQ, total_PQ, index, ways))
    wait()

    def call() -> float:
        started = time.perf_counter()
        for left_BTP, right_BTQ, total_PQ, index, ways in work:
            if kernels.usable(left_BTP, right_BTQ, total_PQ):
                kernels.add_squared_products(left_BTP, right_BTQ, total_PQ)
            for way in ways:
                way.entries(left_BTP.flatten(0, 1), right_BTQ.flatten(0, 1), index)
        wait()
        return time.perf_counter() - started

    return {"first": call(), "second": call()}


def _draw(batch: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, gpu_models.TOKENS, width, device=gpu_models.DEVICE, dtype=dtype)


def _matrix(p: int, q: int, dtype: torch.dtype) -> str:
    return f"[{p}, {q}] {str(dtype).removeprefix('torch.')}"


if __name__ == "__main__":
    print(json.dumps(first_and_second_call()), flush=True)
