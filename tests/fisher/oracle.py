"""The Fisher information by one backward pass per sample through the model's own loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import irdscale
from irdscale import accumulate_fisher
from tests.tiny_models import collate


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The Hugging Face loss of a batch of one, in float64 where transformers rounds the logits to float32."""
    output, labels = model(**batch), batch["labels"]
    if output.logits.dim() == 3:
        loss = F.cross_entropy(output.logits[0, :-1], labels[0, 1:])
    elif model.config.num_labels == 1:
        loss = F.mse_loss(output.logits.squeeze(), labels.squeeze())
    else:
        loss = F.cross_entropy(output.logits, labels)
    torch.testing.assert_close(loss.float(), output.loss.float())
    return loss


def brute_force(model: Any, rows: list[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
    """Mean of squared gradients of the Hugging Face loss of a batch of one, and each sample's sum."""
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    traces = []
    for row in rows:
        model.zero_grad()
        loss_of(model, collate([row])).backward()
        squares = {n: torch.zeros_like(p) if p.grad is None else p.grad**2 for n, p in parameters.items()}
        for name, square in squares.items():
            sums[name] += square
        traces.append(sum(square.sum() for square in squares.values()))
    model.zero_grad()
    return {name: total / len(rows) for name, total in sums.items()}, torch.stack(traces)


EXACT = {"rtol": 1e-9, "atol": 1e-16}


def assert_same(diagonal: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(diagonal) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(diagonal[name], value, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def fallbacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("irdscale")]


def accumulate(model: Any, rows: list[dict[str, Any]], **options: Any) -> irdscale.Fisher:
    return accumulate_fisher(model, rows, collate_fn=collate, dtype=torch.float64, **options)
