"""Losses a few tokens at a time against those of all logits at once, in float64."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from irdscale.models import chunked_losses
from irdscale.models.chunked_losses import (
    IGNORED,
    drawn_tokens,
    finishing,
    found_losses,
    headless,
    measured_tokens,
    next_tokens,
    token_losses,
)
from tests.memory.measured import peak
from tests.tiny_models import VOCABULARY, collate, samples, tiny

EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(params=[1, 7 * VOCABULARY, 2**24], ids=["a token", "seven", "all"])
def entries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many logits there are at a time."""
    monkeypatch.setattr(chunked_losses, "ENTRIES", request.param)


def hidden_and_targets() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(12, VOCABULARY).double()
    hidden_BTD = torch.randn(3, 9, 12, dtype=torch.float64, requires_grad=True)
    targets_BT = torch.randint(0, VOCABULARY, (3, 9))
    targets_BT[torch.rand(3, 9) < 0.4] = IGNORED
    return head, hidden_BTD, targets_BT


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("learning", [False, True])
def test_losses_and_gradients_of_all_logits(learning: bool) -> None:
    head, hidden_BTD, targets_BT = hidden_and_targets()
    head.requires_grad_(learning)
    weights_BT = torch.randn(3, 9, dtype=torch.float64)
    wanted = [hidden_BTD, *(head.parameters() if learning else ())]
    expected_BT = F.cross_entropy(head(hidden_BTD).transpose(1, 2), targets_BT, reduction="none")
    expected = torch.autograd.grad((expected_BT * weights_BT).sum(), wanted)
    losses_BT = found_losses(head, hidden_BTD, targets_BT)
    found = torch.autograd.grad((losses_BT * weights_BT).sum(), wanted)
    torch.testing.assert_close(losses_BT, expected_BT, **EXACT)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(found_losses(head, hidden_BTD, targets_BT), expected_BT, **EXACT)
        places_K = (targets_BT != IGNORED).flatten().nonzero().flatten()
        torch.testing.assert_close(found_losses(head, hidden_BTD, targets_BT, places_K), expected_BT, **EXACT)
        measured_BT, right_BT = measured_tokens(head, hidden_BTD, targets_BT, places_K)
        torch.testing.assert_close(measured_BT, expected_BT, **EXACT)
        assert torch.equal(right_BT, head(hidden_BTD).argmax(-1) == targets_BT)


def test_a_text_without_targets_has_losses_of_zero() -> None:
    head, hidden_BTD, targets_BT = hidden_and_targets()
    losses_BT = found_losses(head, hidden_BTD, torch.full_like(targets_BT, IGNORED))
    assert not losses_BT.any()
    assert losses_BT.requires_grad


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_taken_apart_give_their_own_losses(family: str) -> None:
    model = tiny(family, "lm")
    batch = collate(samples("lm"))
    labels_BT = batch.pop("labels")
    parts = headless(model, batch)
    assert parts is not None
    expected_BT = token_losses(model(**batch).logits, next_tokens(labels_BT))

    def finish(hidden_BTD: Tensor, labels: Tensor) -> Tensor:
        return found_losses(parts.head, hidden_BTD, next_tokens(labels))

    with finishing(model, parts, finish):
        torch.testing.assert_close(model(**batch, labels=labels_BT), expected_BT, **EXACT)
        # What asks a model that is being trained goes by its own forward pass.
        assert headless(model, batch) == parts
        with finishing(model, parts, lambda hidden: hidden.shape):
            assert model(**batch) == (8, 9, 12)
        torch.testing.assert_close(model(**batch, labels=labels_BT), expected_BT, **EXACT)
    assert model(**batch).logits.shape == (8, 9, VOCABULARY)


def test_a_model_that_does_more_with_its_logits_is_not_taken_apart(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 12, "num_hidden_layers": 1, "head_dim": 6}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20, "pad_token_id": 0}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.5)).double().eval()
    batch = collate(samples("lm"))
    batch.pop("labels")
    with caplog.at_level(logging.WARNING):
        assert headless(model, batch) is None
    assert "Gemma2ForCausalLM does more than its head to its logits" in caplog.text
    model.config.final_logit_softcapping = None
    assert headless(model, batch) is not None


@pytest.mark.usefixtures("entries")
def test_tokens_are_drawn_by_sample_and_with_the_models_probabilities() -> None:
    head, hidden_BTD, _ = hidden_and_targets()
    labels_BT = torch.zeros(3, 9, dtype=torch.int64)
    labels_BT[0, :4] = IGNORED
    drawn_BT = drawn_tokens(head, hidden_BTD, labels_BT, [5, 3, 8], 0)
    assert torch.equal(drawn_BT == IGNORED, (labels_BT == IGNORED) | (torch.arange(9) == 0))
    alone_1T = drawn_tokens(head, hidden_BTD[1:2], labels_BT[1:2], [3], 0)
    assert torch.equal(alone_1T, drawn_BT[1:2])
    # One hidden state many times: the frequencies are the probabilities.
    many = 4000
    hidden_1TD = hidden_BTD[:1, :1].detach().expand(1, many, 12)
    drawn = drawn_tokens(head, hidden_1TD, torch.zeros(1, many, dtype=torch.int64), [0], 1)[0, 1:]
    shares_V = torch.bincount(drawn, minlength=VOCABULARY) / (many - 1)
    p_V = head(hidden_1TD[0, 0]).softmax(0).detach()
    assert float((shares_V - p_V).abs().max()) < 4 * (0.25 / many) ** 0.5


def test_memory_follows_a_part_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 tokens of a vocabulary of 32768: all logits would take 256 MiB, and their gradient as much."""
    monkeypatch.setattr(chunked_losses, "ENTRIES", 2**20)
    head = nn.Linear(8, 32768, bias=False).requires_grad_(False)
    hidden_BTD = torch.randn(1, 2048, 8, requires_grad=True)
    targets_BT = torch.zeros(1, 2048, dtype=torch.int64)
    # Logits, log-softmax and two gradients of a part, 4 MiB each.
    assert peak(lambda: found_losses(head, hidden_BTD, targets_BT).sum().backward()) < 24 * 2**20
