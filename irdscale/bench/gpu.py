"""The benchmarks of a GPU; ratios are measured side by side.

Models are random Llamas in bfloat16, as wide as those of 1B and 8B parameters. The most important rows come first, each
is logged as it is measured, and a row that does not fit the memory or the time is skipped with a warning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from irdscale.bench.gpu_fisher import fisher_rows
from irdscale.bench.gpu_language import generation_rows, quantized_rows
from irdscale.bench.gpu_models import SIZES, free
from irdscale.bench.gpu_products import compile_rows, squares_rows, way_rows
from irdscale.bench.gpu_steps import Peaks, plan_rows, step_rows
from irdscale.bench.gpu_trainer import trainer_rows
from irdscale.bench.timing import line_of
from irdscale.errors import InputError

log = logging.getLogger(__name__)

# Seconds after which no further group of rows begins.
BUDGET_S = 170
Measurements = Callable[[], Iterator[dict[str, Any]]]


def _groups() -> dict[str, Measurements]:
    small, large = SIZES
    peaks: Peaks = {}
    return {
        f"Fisher pass, {small}": partial(fisher_rows, small),
        f"steps, {small}": partial(step_rows, small, peaks),
        f"squares kernel, {small}": partial(squares_rows, small),
        f"squares kernel, {large}": partial(squares_rows, large),
        f"steps, {large}": partial(step_rows, large, peaks),
        "fine_tune": trainer_rows,
        f"quantised base, {small}": partial(quantized_rows, small),
        "generation": generation_rows,
        "compiling": partial(compile_rows, small),
        "peaks against the plan": partial(plan_rows, peaks),
        f"ways of a sparse product, {small}": partial(way_rows, small),
        f"ways of a sparse product, {large}": partial(way_rows, large),
    }


GROUPS = len(_groups())


def run_gpu_bench(advance: Callable[..., None] = lambda: None) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure everything on the first GPU, and log each row.

    Args:
        advance: called after each of `GROUPS` groups of rows.

    Returns:
        Rows as in `irdscale.bench.run_bench`, and a line for each group that failed.

    Raises:
        InputError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise InputError("found no CUDA device", "one to measure the GPU's part on", key="bench")
    return run_groups(_groups(), advance)


def run_groups(groups: dict[str, Measurements], advance: Callable[..., None]) -> tuple[list[dict[str, Any]], list[str]]:
    """`run_gpu_bench` of these groups of rows; a failed group does not stop the others."""
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    started = time.perf_counter()
    for title, measure in groups.items():
        if time.perf_counter() - started > BUDGET_S:
            log.warning("bench: %s: left out, because the %d s of this part are over", title, BUDGET_S)
        else:
            _measure(title, measure, rows, failed)
        free()
        advance()
    return rows, failed


def _measure(title: str, measure: Measurements, rows: list[dict[str, Any]], failed: list[str]) -> None:
    last = time.perf_counter()
    try:
        for found in measure():
            now = time.perf_counter()
            log.info("%s", line_of(found, now - last))
            rows.append(found)
            last = now
    except torch.OutOfMemoryError:
        log.warning("bench: %s: does not fit the GPU; the rest of its rows are left out", title)
    except Exception as error:  # compilers and drivers raise anything, and the other rows are still useful
        failed.append(" ".join(f"{title}: {type(error).__name__}: {error}".split())[:300])
        log.warning("bench: %s", failed[-1])
