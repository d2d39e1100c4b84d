"""A training by `fine_tune` on a GPU against a bare loop of the same sparse model, optimizer, loss and batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch

from irdscale.bench import gpu_models
from irdscale.bench.gpu_exact import CONFIG
from irdscale.bench.gpu_models import Size, collate, make_rows, wait
from irdscale.bench.gpu_steps import random_mask
from irdscale.bench.timing import row
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.models.chunked_losses import finishing, found_losses, headless, next_tokens
from irdscale.sparse import sparsify
from irdscale.training.control import Control
from irdscale.training.trainer import fine_tune

BAR = 1.10
NAME = "135M-like"
SIZE = Size(576, 1536, 30, 9, batch=16, key_value_heads=3, vocabulary=49_152)
TOKENS = 256
WARM_UP, STEPS, REPEATS = 5, 20, 3
RATIO = 0.005


@dataclass(frozen=True)
class _Texts:
    """Rows of which a training takes some, again and again, by their places."""

    rows: list[dict[str, Any]]
    order: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows if self.order is None else self.order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.rows[place if self.order is None else self.order[place]]

    def select(self, order: list[int]) -> _Texts:
        return _Texts(self.rows, tuple(order))


def trainer_rows() -> Iterator[dict[str, Any]]:
    """A step in `fine_tune` over one in the bare loop, of a Llama of 135M parameters, after the first ones."""
    rows = make_rows(SIZE, 4 * SIZE.batch, TOKENS)
    texts = _Texts(rows)
    task = cast(Any, SimpleNamespace(train=texts, trained=texts, collate=collate, is_language=True))
    model = gpu_models.make_model(SIZE)
    sparse = sparsify(model, random_mask(model, RATIO))
    asked = [f"train.steps={WARM_UP + STEPS}", f"train.batch_size={SIZE.batch}", "train.learning_rate=1e-4"]
    config = load_config(CONFIG, asked)
    seconds: dict[str, list[float]] = {"fine_tune": [], "loop": []}
    # In turn, and the first of each is not counted.
    for repeat in range(REPEATS + 1):
        for name, work in (("fine_tune", lambda: _tuned(sparse, task, config)), ("loop", lambda: _loop(sparse, rows))):
            taken = work()
            if repeat:
                seconds[name].append(taken)
    what = f"step in fine_tune / bare loop, batch {SIZE.batch}"
    yield row("train", what, NAME, TOKENS, seconds, "fine_tune", "loop", limit=BAR)


def _tuned(model: Any, task: Any, config: RunConfig) -> float:
    """Seconds of a step, by when those after the first ones were made."""
    ends: list[float] = []

    def advance(n: float = 1) -> None:
        if len(ends) + n in (WARM_UP, WARM_UP + STEPS):
            wait()
        ends.extend([time.perf_counter()] * int(n))

    fine_tune(model, task, config, 0, Control(advance))
    return (ends[-1] - ends[WARM_UP - 1]) / STEPS


def _loop(model: Any, rows: list[dict[str, Any]]) -> float:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batches = [gpu_models.on_device(rows[start : start + SIZE.batch]) for start in range(0, len(rows), SIZE.batch)]
    step = _stepper(model, optimizer)
    parts = headless(model, batches[0])
    assert parts is not None

    def finish(hidden_BTD: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # All but the first of each text are targets.
        return found_losses(parts.head, hidden_BTD, next_tokens(labels)).sum() / (labels[:, 1:].numel())

    with finishing(model, parts, finish):
        for i in range(WARM_UP):
            step(batches[i % len(batches)])
        wait()
        started = time.perf_counter()
        for i in range(STEPS):
            step(batches[i % len(batches)])
        wait()
    taken = time.perf_counter() - started
    model.eval()
    return taken / STEPS


def _stepper(model: Any, optimizer: torch.optim.Optimizer) -> Callable[[dict[str, torch.Tensor]], None]:
    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()

    return step
