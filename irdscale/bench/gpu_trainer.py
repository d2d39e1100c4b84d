"""A training by `fine_tune` on a GPU against a bare loop of the same sparse model, optimizer, loss and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from irdscale.bench import gpu_models
from irdscale.bench.gpu_exact import CONFIG
from irdscale.bench.gpu_models import Size, collate, make_rows
from irdscale.bench.gpu_steps import random_mask
from irdscale.bench.timing import row
from irdscale.bench.trainer import step_seconds
from irdscale.config.loader import load_config
from irdscale.models.chunked_losses import finishing, found_losses, headless, next_tokens
from irdscale.sparse import sparsify

BAR = 1.10
NAME = "135M-like"
SIZE = Size(576, 1536, 30, 9, batch=16, key_value_heads=3, vocabulary=49_152)
TOKENS = 256
WARM_UP, STEPS, REPEATS = 5, 20, 3
RATIO = 0.005


@dataclass(frozen=True)
class _Texts:
    """Rows of which a training selects some, repeatedly, by their indices."""

    rows: list[dict[str, Any]]
    order: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows if self.order is None else self.order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.rows[place if self.order is None else self.order[place]]

    def select(self, order: list[int]) -> _Texts:
        return _Texts(self.rows, tuple(order))


def trainer_rows() -> Iterator[dict[str, Any]]:
    """A step in `fine_tune` over one in the bare loop, of a Llama of 135M parameters, after the warm-up."""
    rows = make_rows(SIZE, 4 * SIZE.batch, TOKENS)
    texts = _Texts(rows)
    task = SimpleNamespace(train=texts, trained=texts, collate=collate, is_language=True)
    model = gpu_models.make_model(SIZE)
    sparse = sparsify(model, random_mask(model, RATIO))
    options = [f"train.steps={WARM_UP + STEPS}", f"train.batch_size={SIZE.batch}", "train.learning_rate=1e-4"]
    config = load_config(CONFIG, options)
    seconds = step_seconds(sparse, task, config, WARM_UP, REPEATS, partial(_stepping, sparse, rows))
    what = f"step in fine_tune / bare loop, batch {SIZE.batch}"
    yield row("train", what, NAME, TOKENS, seconds, "fine_tune", "bare", limit=BAR)


@contextmanager
def _stepping(model: Any, rows: list[dict[str, Any]]) -> Iterator[Callable[[int], None]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batches = [gpu_models.on_device(rows[start : start + SIZE.batch]) for start in range(0, len(rows), SIZE.batch)]
    parts = headless(model, batches[0])
    assert parts is not None

    def finish(hidden_BTD: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # All tokens but the first of each text are targets.
        return found_losses(parts.head, hidden_BTD, next_tokens(labels)).sum() / (labels[:, 1:].numel())

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batches[number % len(batches)]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    with finishing(model, parts, finish):
        yield step
