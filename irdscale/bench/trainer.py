"""What `fine_tune` adds to a training step: its steps against a bare loop of the same model, optimizer and batches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from irdscale.bench.models import make_rows
from irdscale.bench.timing import row
from irdscale.config.schema import RunConfig
from irdscale.distributed.zero3 import device_of

if TYPE_CHECKING:
    from datasets import Dataset

STEPS = 12
# Steps that are not timed: the first ones start up.
WARM = 2
REPEATS = 5


def trainer_row(name: str, model: nn.Module, batch: int, tokens: int, limit: float) -> dict[str, Any]:
    """The row of a sparse classifier, on the device that `fine_tune` takes: the GPU where there is one.

    Args:
        name: the model's, in the row.
        model: a sparse one; it is trained.
        batch, tokens: samples a step, and tokens of each; the samples are random.
        limit: the bar.
    """
    task = _Rows(_samples(batch * (STEPS + WARM), tokens))
    config = RunConfig.model_validate(
        {
            "model": {"path": name},
            "task": {"kind": "sequence-classification", "dataset": "random"},
            "train": {"steps": STEPS + WARM, "batch_size": batch, "learning_rate": 1e-5},
        }
    )
    seconds: dict[str, list[float]] = {"fine_tune": [], "bare": []}
    for repeat in range(REPEATS + 1):
        found = {"fine_tune": _fine_tune(model, task, config), "bare": _bare(model, task, batch)}
        if repeat:
            for way, took in found.items():
                seconds[way].append(took / STEPS)
    what = "step in fine_tune / bare loop of the same model and optimizer"
    return row("train", what, name, tokens, seconds, "fine_tune", "bare", limit=limit)


@dataclass
class _Rows:
    """As much of a task as a training needs."""

    trained: Dataset
    is_language: bool = False

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        from irdscale.tasks.tokens import pad_batch

        return pad_batch(samples, 0)


def _samples(count: int, tokens: int) -> Dataset:
    """Random samples as a task holds them."""
    import datasets

    rows = make_rows(tokens, count)
    return datasets.Dataset.from_list([{"input_ids": r["input_ids"].tolist(), "labels": r["labels"]} for r in rows])


def _fine_tune(model: nn.Module, task: _Rows, config: RunConfig) -> float:
    from irdscale.training.control import Control
    from irdscale.training.trainer import fine_tune

    stamps: list[float] = []

    def advance(steps: int = 1) -> None:
        if steps:
            if len(stamps) + 1 in (WARM, STEPS + WARM):
                _wait(model)
            stamps.append(time.perf_counter())

    fine_tune(model, cast(Any, task), config, 0, Control(advance))
    return stamps[-1] - stamps[WARM - 1]


def _bare(model: Any, task: _Rows, size: int) -> float:
    rows = [task.trained[i] for i in range(len(task.trained))]
    device = device_of(model)
    batches = [task.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    model.train()
    started = 0.0
    for step, batch in enumerate(batches):
        if step == WARM:
            _wait(model)
            started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()
    _wait(model)
    return time.perf_counter() - started


def _wait(model: nn.Module) -> None:
    if device_of(model).type == "cuda":
        torch.cuda.synchronize()
