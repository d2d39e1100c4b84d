"""How often the host waits for the device: once for many batches, and never inside one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.fisher import SampleGradients, passes, sample_loss, scored_parameters
from irdscale.fisher.accumulate import new_sums
from irdscale.models import chunked_losses
from irdscale.models.chunked_losses import next_tokens, token_losses
from irdscale.training import evaluate_language
from irdscale.training.evaluate import evaluate_model
from tests.tiny_models import collate, samples, tiny
from tests.training.test_evaluate_language import made, texts
from tests.waits import Waits


def model_waits(model: Any, batch: dict[str, Any]) -> int:
    """Of a plain forward and backward pass: transformers asks whether anything is padded."""
    with Waits() as waits:
        model(**{k: v for k, v in batch.items() if k != "labels"}).logits.sum().backward()
    model.zero_grad()
    return waits.total


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "llama of texts"])
@pytest.mark.parametrize("what", ["masks", "traces", "losses"])
def test_passes_read_the_device_once_for_many_batches(family: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = "lm" if family.endswith("texts") else "classification"
    model = tiny(family.split()[0], head)
    rows = [samples(head)[0] | {"row": i} for i in range(4 * passes.BATCHES_BETWEEN)]
    monkeypatch.setattr(sample_loss, "target_places", (waits := Waits()).host(chunked_losses.target_places))
    scored = scored_parameters(model, [r"layers\."] if head == "lm" else None)
    taken = SampleGradients(model, rows, waits.host(collate), scored, batch_size=2)
    taken.prepare(range(len(rows)))
    sums, traces = new_sums(taken, range(len(rows))), torch.zeros(len(rows), dtype=torch.float64)
    work: dict[str, Any] = {
        "masks": lambda count: taken.accumulate(range(count), sums, traces),
        "traces": lambda count: taken.add_traces(range(count), traces),
        "losses": lambda count: taken.label_losses([1] * len(rows)) if count == len(rows) else None,
    }
    found = []
    for count in (len(rows) // 2, len(rows)):
        before = waits.total
        with waits:
            work[what](count)
        found.append(waits.total - before)
    batches = len(rows) // 4 if what != "losses" else len(rows) // 2
    own = batches * model_waits(model, collate(rows[:2]))
    assert own <= found[1] - found[0] <= own + 3, waits.counts
    assert waits.softmax <= {-1}


@pytest.mark.parametrize("kind", ["sft", "multiple-choice"])
def test_evaluation_reads_the_device_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"q": q, "a": a, "c": [a, q], "y": 1} for q, a in zip(texts(24, 0), texts(24, 1), strict=True)]
    columns = {"prompt": "q", "completion": "a"} if kind == "sft" else {"prompt": "q", "choices": ["c"], "label": "y"}
    model, task = made(tmp_path, "llama", rows, kind=kind, columns=columns)
    found = []
    for batch_size in (24, 2):
        waits = Waits()
        monkeypatch.setattr(evaluate_language, "target_places", waits.host(chunked_losses.target_places))
        monkeypatch.setattr(evaluate_language, "pad_batch", waits.host(evaluate_language.pad_batch))
        with waits:
            evaluate_model(model, task, task.test, batch_size)
        assert waits.softmax == {-1}
        found.append(waits.total)
    # Eleven batches more (of choices twice as many), in each of which the model asks whether anything is padded.
    assert found[1] - found[0] <= 2 * (11 if kind == "sft" else 22), waits.counts


def test_token_losses_take_their_softmax_over_the_last_dimension() -> None:
    logits_BTV, labels_BT = torch.randn(2, 5, 7, requires_grad=True), torch.randint(0, 7, (2, 5))
    with Waits() as waits:
        token_losses(logits_BTV, next_tokens(labels_BT)).sum().backward()
    assert waits.softmax == {-1}
    assert waits.total == 0
