"""Models for which the rules are not exact, against one backward pass per sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.accumulate import new_sums
from tests.fisher.oracle import accumulate, assert_same, fallbacks
from tests.tiny_models import collate, samples


class Outside(nn.Module):
    """A parameter that no module's forward holds, and modules of many kinds that do."""

    def __init__(self, direct: bool, mixing: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 6, padding_idx=0)
        self.scale = nn.RMSNorm(6)
        self.mix = nn.Conv1d(6, 6, 3, padding=1)
        self.twice = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3, bias=False)
        self.direct, self.mixing = direct, mixing

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids) * attention_mask.unsqueeze(2)
        x = self.mix(self.scale(x).transpose(1, 2)).transpose(1, 2)
        x = self.relu(self.twice(x)) + self.twice(torch.tanh(x))
        x = (x * attention_mask.unsqueeze(2)).sum(1)
        if self.mixing:
            x = self.twice(x - x.mean(0))
        logits = self.head(x)
        return logits + (x @ self.twice.weight)[:, :3] if self.direct else logits


def autograd_squares(model: nn.Module, rows: list[dict[str, Any]], size: int) -> dict[str, Tensor]:
    """Squared gradients of each sample's loss within its own batch, for models without a Hugging Face loss."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size])
        labels = batch.pop("labels")
        for n in range(len(labels)):
            loss = nn.functional.cross_entropy(model(**batch)[n : n + 1], labels[n : n + 1])
            for (name, _), g in zip(
                model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                sums[name] += g**2 / len(rows)
    return sums


@pytest.mark.parametrize(("direct", "reason"), [(False, None), (True, "twice.weight is used outside the forward")])
def test_own_models(direct: bool, reason: str | None, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, rows = Outside(direct, mixing=False).double(), samples()
    fisher = accumulate(model, rows, batch_size=3)
    assert_same(fisher.diagonal, autograd_squares(model, rows, size=1))
    assert (reason is None and not fallbacks(caplog)) or (reason is not None and reason in caplog.text)


class InPlace(nn.Module):
    """Changes the output of a linear layer, a view, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.twice, self.head = nn.Embedding(40, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.twice(self.embedding(input_ids)).relu_() * attention_mask.unsqueeze(2)
        return self.head(x.sum(1))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_outputs_that_are_changed_in_place(batch_size: int) -> None:
    torch.manual_seed(0)
    model, rows = InPlace().double(), samples()
    assert_same(accumulate(model, rows, batch_size=batch_size).diagonal, autograd_squares(model, rows, size=1))


def test_a_model_that_mixes_samples_falls_to_one_sample(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, rows = Outside(direct=False, mixing=True).double(), samples()
    fisher = accumulate(model, rows, batch_size=4)
    assert "depends on the other samples" in caplog.text
    assert_same(fisher.diagonal, autograd_squares(model, rows, size=1))


def test_a_first_batch_of_one_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, rows = Outside(direct=False, mixing=True).double(), samples()
    gradients = SampleGradients(model, rows, collate, scored_parameters(model), batch_size=4)
    sums = new_sums(gradients, range(len(rows)), dtype=torch.float64)
    gradients.accumulate(range(len(rows)), sums, boundaries=[1])
    assert "depends on the other samples" in caplog.text
    assert_same({n: s / len(rows) for n, s in sums.tensors.items()}, autograd_squares(model, rows, size=1))
