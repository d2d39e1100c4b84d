"""The ranking of samples, against losses and lengths of single samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import datasets
import pytest
import torch

from irdscale.config.schema import RunConfig
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.pool import ranked_samples
from tests.fisher.oracle import loss_of
from tests.tiny_models import collate, samples, tiny

TASKS = {"classification": "sequence-classification", "regression": "regression", "lm": "causal-lm"}


def ranked(head: str, gradients: SampleGradients, traces: torch.Tensor, **options: Any) -> list[int]:
    fisher = {"samples": len(traces), "token_reduction": gradients.token_reduction}
    sections = {"model": {"path": "x"}, "task": {"dataset": "x", "kind": TASKS[head]}, "fisher": fisher}
    config = RunConfig.model_validate({**sections, "search": {"min_samples": 1, **options}})
    task = cast(Any, SimpleNamespace(kind=TASKS[head], is_language=head == "lm"))
    return ranked_samples(config, task, gradients, traces, gradients.label_losses([1] * len(traces)))


def gradients_of(head: str, count: int = 9, **options: Any) -> tuple[SampleGradients, list[dict[str, Any]]]:
    model, rows = tiny("gpt2", head), samples(head, count=count)
    return SampleGradients(
        model, datasets.Dataset.from_list(rows), collate, scored_parameters(model), batch_size=4, **options
    ), rows


def descending(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])


@pytest.mark.parametrize("head", list(TASKS))
def test_ranking_by_losses(head: str) -> None:
    gradients, rows = gradients_of(head)
    with torch.no_grad():
        expected = torch.stack([loss_of(gradients.model, collate([row])) for row in rows])
    # Nearly equal, so that the losses decide.
    traces = 1 + torch.arange(9).double() / 1000
    order = ranked(head, gradients, traces, rank_by="loss")
    assert order == descending((traces / expected).tolist())
    assert order != descending(traces.tolist())


def test_of_squared_errors_the_residual_cancels() -> None:
    """A trace is 4 r^2 |df|^2: ranked by trace / loss, labels do not count."""
    gradients, rows = gradients_of("regression")
    other = SampleGradients(
        gradients.model,
        datasets.Dataset.from_list([{**row, "labels": row["labels"] + 3.0 * i} for i, row in enumerate(rows)]),
        collate,
        gradients.scored,
    )
    orders = []
    for one in (gradients, other):
        traces = torch.zeros(9, dtype=torch.float64)
        one.add_traces(range(9), traces)
        orders.append((ranked("regression", one, traces), ranked("regression", one, traces, rank_by="loss")))
    assert orders[0][1] == orders[1][1]
    assert orders[0][0] != orders[1][0]


def test_a_loss_of_zero_counts_as_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, _ = gradients_of("regression", 3)
    losses = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    monkeypatch.setattr(gradients, "label_losses", lambda lengths: losses)
    assert ranked("regression", gradients, torch.tensor([1.0, 0.0, 2.0]).double(), rank_by="loss") == [0, 2, 1]


def test_length_is_what_a_mean_divides_by() -> None:
    traces = 1 + torch.arange(9).double() / 1000
    gradients, rows = gradients_of("classification")
    by_hand = [float(traces[i]) * len(row["input_ids"]) for i, row in enumerate(rows)]
    assert ranked("classification", gradients, traces, rank_by="length") == descending(by_hand)
    orders = []
    for reduction in ("mean", "sum"):
        gradients, rows = gradients_of("lm", token_reduction=cast(Any, reduction))
        traces = torch.zeros(9, dtype=torch.float64)
        gradients.add_traces(range(9), traces)
        orders.append(ranked("lm", gradients, traces, rank_by="length"))
        targets = [len(row["labels"]) - 1 for row in rows]
        by_hand = [float(t) * n if reduction == "mean" else float(t) / n for t, n in zip(traces, targets, strict=True)]
        assert orders[-1] == descending(by_hand) != descending(traces.tolist())
    assert orders[0] == orders[1], "either reduction gives the same ranking"
