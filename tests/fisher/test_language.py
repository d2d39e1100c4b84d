"""Fisher passes over texts: losses of their targets by mean or sum, with and without the logits of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from irdscale import accumulate_fisher
from irdscale.fisher import SampleGradients, sample_loss, scored_parameters
from irdscale.models import chunked_losses
from irdscale.models.chunked_losses import IGNORED
from tests.tiny_models import collate, samples, tiny

EXACT = {"rtol": 1e-9, "atol": 1e-16}
BLOCKS = r"\.(layers|h)\.\d+\."


def answered(count: int = 8) -> list[dict[str, Any]]:
    """Texts of which only the second half is learnt."""
    rows = [row for row in samples("lm", count=2 * count) if len(row["input_ids"]) > 3][:count]
    for row in rows:
        half = len(row["labels"]) // 2
        row["labels"] = [IGNORED] * half + row["labels"][half:]
    return rows


def brute_force(model: Any, rows: list[dict[str, Any]], reduction: str, names: list[str]) -> dict[str, Tensor]:
    """Mean of squared gradients of each text's own loss."""
    sums = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for row in rows:
        batch = collate([row])
        model.zero_grad()
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction=reduction).backward()
        for name, total in sums.items():
            total += model.get_parameter(name).grad ** 2
    model.zero_grad()
    return {name: total / len(rows) for name, total in sums.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("entries", [60, 2**24])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_brute_force(
    family: str, reduction: Any, entries: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_losses, "ENTRIES", entries)
    model, rows = tiny(family, "lm"), answered()
    names = list(scored_parameters(model, BLOCKS))
    expected = brute_force(model, rows, reduction, names)
    if checkpointing:
        model.gradient_checkpointing_enable()
    taken: list[int] = []
    monkeypatch.setattr(sample_loss, "found_losses", lambda *a: taken.append(1) or chunked_losses.found_losses(*a))
    fisher = accumulate_fisher(
        model, rows, collate_fn=collate, dtype=torch.float64, include=BLOCKS, token_reduction=reduction, batch_size=3
    )
    assert len(taken) == 3, "the logits of all tokens were made"
    assert list(fisher.diagonal) == names
    for name, value in expected.items():
        torch.testing.assert_close(fisher.diagonal[name], value, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    squares = sum(float(value.sum()) for value in expected.values())
    assert float(fisher.sample_trace.mean()) == pytest.approx(squares, rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_drawn_targets_are_the_same_with_the_head_apart(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring the head too makes all logits; the blocks' Fisher information is the same either way."""
    model, rows = tiny("llama", "lm", tie_word_embeddings=False), answered()
    options: dict[str, Any] = {"collate_fn": collate, "dtype": torch.float64, "objective": "sampled", "seed": 4}
    apart = accumulate_fisher(model, rows, include=BLOCKS, batch_size=batch_size, **options)
    whole = accumulate_fisher(model, rows, include=rf"{BLOCKS}|lm_head", **options)
    for name, value in apart.diagonal.items():
        torch.testing.assert_close(value, whole.diagonal[name], **EXACT)
    label = accumulate_fisher(model, rows, include=BLOCKS, **options | {"objective": "label"})
    assert not torch.allclose(label.sample_trace, apart.sample_trace)


def test_a_tied_head_that_is_scored_sees_all_tokens_together() -> None:
    model, rows = tiny("llama", "lm", tie_word_embeddings=True), answered()
    samples_of = SampleGradients(model, rows, collate, scored_parameters(model), batch_size=2)
    samples_of.prepare(range(len(rows)))
    assert samples_of.loss.headless is None
    names = list(scored_parameters(model))
    fisher = accumulate_fisher(model, rows, collate_fn=collate, dtype=torch.float64)
    for name, value in brute_force(model, rows, "mean", names).items():
        torch.testing.assert_close(fisher.diagonal[name], value, **EXACT)
