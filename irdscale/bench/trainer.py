"""Overhead of `fine_tune`: its steps against a bare loop of the same model, optimizer and batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from irdscale.bench.models import adamw, make_rows
from irdscale.bench.timing import row
from irdscale.config.schema import RunConfig
from irdscale.distributed.zero3 import device_of
from irdscale.training.control import Control
from irdscale.training.trainer import fine_tune

if TYPE_CHECKING:
    from datasets import Dataset

STEPS = 12
# Untimed first steps.
WARM = 2
REPEATS = 5
# Makes the step of a bare loop, which takes the step's number.
Stepping = Callable[[], AbstractContextManager[Callable[[int], None]]]


def trainer_row(name: str, model: nn.Module, batch: int, tokens: int, limit: float) -> dict[str, Any]:
    """The row of a sparse classifier, on the device of `fine_tune`: the GPU, if there is one.

    Args:
        name: name of the model.
        model: sparse model; it is trained.
        batch, tokens: samples per step, and tokens per sample; the samples are random.
        limit: highest ratio that meets the bar.
    """
    from irdscale.tasks.tokens import pad_batch

    trained = _samples(batch * (STEPS + WARM), tokens)
    task = SimpleNamespace(trained=trained, is_language=False, collate=lambda samples: pad_batch(samples, 0))
    config = RunConfig.model_validate(
        {
            "model": {"path": name},
            "task": {"kind": "sequence-classification", "dataset": "random"},
            "train": {"steps": STEPS + WARM, "batch_size": batch, "learning_rate": 1e-5},
        }
    )
    seconds = step_seconds(model, task, config, WARM, REPEATS, partial(_stepping, model, task, batch))
    what = "step in fine_tune / bare loop of the same model and optimizer"
    return row("train", what, name, tokens, seconds, "fine_tune", "bare", limit=limit)


def _samples(count: int, tokens: int) -> Dataset:
    """Random samples in the form of a task's."""
    import datasets

    rows = make_rows(tokens, count)
    return datasets.Dataset.from_list([{"input_ids": r["input_ids"].tolist(), "labels": r["labels"]} for r in rows])


@contextmanager
def _stepping(model: Any, task: Any, size: int) -> Iterator[Callable[[int], None]]:
    rows, device = list(task.trained), device_of(model)
    batches = [task.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    optimizer = adamw(model)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batches[number]).loss.backward()
        optimizer.step()

    yield step


def step_seconds(
    model: nn.Module, task: Any, config: RunConfig, warm: int, repeats: int, stepping: Stepping
) -> dict[str, list[float]]:
    """Seconds of a step after the first `warm` ones, of `fine_tune` and of a bare loop in turn; the first repeat is
    not counted.
    """
    steps, seconds = config.train.steps or 0, dict[str, list[float]](fine_tune=[], bare=[])
    for repeat in range(repeats + 1):
        ends = {"fine_tune": _fine_tune(model, task, config, warm), "bare": _bare(model, stepping, steps, warm)}
        for name, (first, last) in ends.items():
            if repeat:
                seconds[name].append((last - first) / (steps - warm))
    return seconds


def _fine_tune(model: nn.Module, task: Any, config: RunConfig, warm: int) -> tuple[float, float]:
    """Times at the end of the last warm-up step, and of the last step."""
    ends: list[float] = []

    def advance(n: int = 1) -> None:
        if len(ends) + n in (warm, config.train.steps):
            _wait(model)
        ends.extend([time.perf_counter()] * n)

    fine_tune(model, cast(Any, task), config, 0, Control(advance))
    return ends[warm - 1], ends[-1]


def _bare(model: nn.Module, stepping: Stepping, steps: int, warm: int) -> tuple[float, float]:
    model.train()
    first = 0.0
    with stepping() as step:
        for number in range(steps):
            if number == warm:
                _wait(model)
                first = time.perf_counter()
            step(number)
        _wait(model)
    last = time.perf_counter()
    model.eval()
    return first, last


def _wait(model: nn.Module) -> None:
    if device_of(model).type == "cuda":
        torch.cuda.synchronize()
