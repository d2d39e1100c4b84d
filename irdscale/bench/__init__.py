"""Benchmarks: ratios measured side by side in one run, as medians over interleaved repeats.

Models are random, 20-70M parameters, batches of 8: `bert` and `gpt2` (384 wide, 6 layers) and `llama` (512 wide, 6
layers), with a classification head; searches are the quickstart's, on MiniLM. The GPU's part has models of 1B and 8B
parameters; see `irdscale.bench.gpu`. Absolute times are printed too, but do not carry over to other machines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from irdscale.bench.fisher import MODELS as FISHER_MODELS
from irdscale.bench.fisher import bench_fisher
from irdscale.bench.gpu import GROUPS, run_gpu_bench
from irdscale.bench.search import bench_search
from irdscale.bench.train import MODELS as TRAIN_MODELS
from irdscale.bench.train import bench_train
from irdscale.errors import InputError
from irdscale.utils.progress import bar

PARTS = ("fisher", "train", "search", "gpu")


def run_bench(part: str = "all", progress: bool = True) -> dict[str, Any]:
    """Run the benchmarks `fisher`, `train`, `search`, `gpu` or `all` (with `gpu` if there is a GPU).

    Returns:
        {"threads", "torch", "device", "failed", "rows": [{"part", "what", "model", "tokens", "ratio", "low", "high",
        "bar", "met", "seconds"}]}: `ratio` is the median over repeats, `low` and `high` its quartiles, `bar` its
        target; `device` is the GPU, and `failed` lists the GPU's measurements that ended with an error.

    Raises:
        InputError: the part does not exist, or has no GPU.
    """
    if part not in (*PARTS, "all"):
        raise InputError(f"found {part!r}", f"one of {', '.join((*PARTS, 'all'))}", key="bench")
    gpu = torch.cuda.is_available()
    parts = tuple(p for p in PARTS if p != "gpu" or gpu) if part == "all" else (part,)
    failed: list[str] = []

    def bench_gpu(advance: Callable[..., None]) -> list[dict[str, Any]]:
        found, problems = run_gpu_bench(advance)
        failed.extend(problems)
        return found

    rows: list[dict[str, Any]] = []
    measures = {
        "fisher": (bench_fisher, 2 * len(FISHER_MODELS) + 3),
        "train": (bench_train, len(TRAIN_MODELS) + 1),
        "search": (bench_search, 2),
        "gpu": (bench_gpu, GROUPS),
    }
    with bar("Benchmarks", sum(measures[p][1] for p in parts), enabled=progress) as advance:
        for name in parts:
            rows += measures[name][0](advance)
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(0) if gpu else None,
        "failed": failed,
        "rows": rows,
    }
