"""Masks of every (samples, parameters) pair from one pass, against one Fisher accumulation each."""

from __future__ import annotations

import pytest
import torch

from irdscale import accumulate_fisher, top_k
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.nested import rank_samples, ranked_entries_by_prefix
from tests.tiny_models import collate, samples, tiny


@pytest.mark.parametrize("direction", ["ird", "reverse", "random"])
def test_every_mask_of_a_search_and_its_cost(direction: str) -> None:
    model, rows = tiny("bert"), samples(count=19)
    gradients = SampleGradients(model, rows, collate, scored_parameters(model), batch_size=4)
    traces = torch.zeros(len(rows), dtype=torch.float64)
    gradients.add_traces(range(len(rows)), traces)
    order = rank_samples(traces, direction, seed=7)
    sizes, k = [19, 9, 4, 2], 300
    rankings = ranked_entries_by_prefix(gradients, order, sizes, k, dtype=torch.float64)
    assert gradients.taken <= 2 * len(rows)
    assert sorted(rankings) == sorted(sizes)
    for s in sizes:
        chosen = [rows[i] for i in order[:s]]
        fisher = accumulate_fisher(model, chosen, collate_fn=collate, dtype=torch.float64)
        for p in (300, 150, 75, 1):
            assert rankings[s].prefix(p).hash == top_k(fisher, p).hash, (s, p)


def test_order_of_samples() -> None:
    traces = torch.tensor([2.0, 5.0, 1.0, 5.0], dtype=torch.float64)
    assert rank_samples(traces, "ird", 0) == [1, 3, 0, 2]
    assert rank_samples(traces, "reverse", 0) == [2, 0, 1, 3]
    shuffled = rank_samples(torch.zeros(50), "random", 1)
    assert sorted(shuffled) == list(range(50))
    assert shuffled == rank_samples(torch.ones(50), "random", 1)
    assert shuffled != rank_samples(torch.ones(50), "random", 2)


def test_random_shuffle_gives_traces_in_the_accumulation_pass() -> None:
    model, rows = tiny("bert"), samples()
    gradients = SampleGradients(model, rows, collate, scored_parameters(model))
    traces = torch.zeros(len(rows), dtype=torch.float64)
    ranked_entries_by_prefix(gradients, rank_samples(traces, "random", 0), [8, 4], 5, traces=traces)
    assert gradients.taken == len(rows)
    torch.testing.assert_close(traces, accumulate_fisher(model, rows, collate_fn=collate).sample_trace)
