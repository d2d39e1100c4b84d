"""Losses by forward passes alone, against the Hugging Face loss of a batch of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from irdscale.errors import InputError
from irdscale.fisher import SampleGradients, scored_parameters
from tests.fisher.oracle import loss_of
from tests.tiny_models import collate, samples, tiny


@pytest.mark.parametrize(
    ("family", "head", "include", "objective"),
    [
        ("bert", "classification", None, "label"),
        ("deberta", "classification", None, "label"),
        ("gpt2", "regression", None, "expected"),
        ("llama", "lm", None, "label"),
        # A head that is not scored runs a few tokens at a time.
        ("llama", "lm", r"\.layers\.", "sampled"),
    ],
)
def test_label_losses(family: str, head: str, include: str | None, objective: Any) -> None:
    model, rows = tiny(family, head), samples(head)
    with torch.no_grad():
        expected = torch.stack([loss_of(model, collate([row])) for row in rows])
    scored = scored_parameters(model, include)
    gradients = SampleGradients(model, rows, collate, scored, batch_size=3, objective=objective)
    found = gradients.label_losses([len(row["input_ids"]) for row in rows])
    assert (gradients.loss.headless is not None) is (include is not None)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert gradients.taken == 0
    assert gradients.objective == objective
    assert all(p.requires_grad for p in model.parameters())


def test_a_loss_that_is_not_finite_is_named() -> None:
    rows = samples("regression")
    rows[5] = {**rows[5], "labels": float("inf")}
    model = tiny("bert", "regression")
    gradients = SampleGradients(model, rows, collate, scored_parameters(model), batch_size=3)
    with pytest.raises(InputError, match=r"sample 5 \(row 5 of its split\): found a loss of inf"):
        gradients.label_losses([1] * len(rows))
