"""Each score against its definition, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from irdscale import Fisher, top_k
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.nested import ranked_entries_by_prefix
from irdscale.fisher.scores import entry_scores
from tests.fisher.oracle import loss_of
from tests.tiny_models import collate, samples, tiny


def by_hand(score: str, model: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        model.zero_grad()
        loss_of(model, collate([row])).backward()
        for name, p in parameters.items():
            if p.grad is not None:
                mean[name] += p.grad / len(rows)
    model.zero_grad()
    if score == "gradient":
        return {name: g.abs() for name, g in mean.items()}
    if score == "saliency":
        return {name: (parameters[name].detach() * g).abs() for name, g in mean.items()}
    if score == "gem":
        return {name: g.abs() / (parameters[name].detach().abs() + 1e-8) for name, g in mean.items()}
    if score == "gallop":
        small = {name: p.detach().abs() <= p.detach().abs().sum() / p.numel() for name, p in parameters.items()}
        return {name: torch.where(small[name], g.abs(), 0) for name, g in mean.items()}
    return {name: p.detach().abs() for name, p in parameters.items()}


@pytest.mark.parametrize("score", ["gradient", "saliency", "gem", "gallop", "magnitude"])
@pytest.mark.parametrize(
    ("family", "head"), [("bert", "classification"), ("gpt2", "lm"), ("llama", "lm"), ("deberta", "classification")]
)
def test_masks_are_those_of_the_definition(score: Any, family: str, head: str) -> None:
    model, rows = tiny(family, head), samples(head, count=7)
    gradients = SampleGradients(model, rows, collate, scored_parameters(model), batch_size=3)
    order = [3, 1, 6, 0, 2, 5, 4]
    rankings = ranked_entries_by_prefix(gradients, order, [7, 3], 300, score=score, dtype=torch.float64)
    for size in (7, 3):
        expected = by_hand(score, model, [rows[i] for i in order[:size]])
        fisher = Fisher(expected, torch.zeros(0, dtype=torch.float64))
        for k in (300, 40):
            found, wanted = rankings[size].prefix(k), top_k(fisher, k)
            entries = [{(n, i) for n, index in m.indices.items() for i in index.tolist()} for m in (found, wanted)]
            shared = len(entries[0] & entries[1])
            assert found.k == k
            assert shared >= k - 1, "but for one near tie"
    assert gradients.taken == (0 if score == "magnitude" else 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_weights_come_first_as_in_super_tuning(dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(31, 17, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight[0, :3] = torch.tensor([0.0, -0.0, 1e-30])
    scored = dict(linear.named_parameters())
    (small,) = entry_scores("small_magnitude", scored, {}, 0).values()
    (large,) = entry_scores("magnitude", scored, {}, 0).values()
    assert small.min() >= 0
    order = small.flatten().argsort(descending=True)
    assert torch.equal(large.flatten()[order], large.flatten().sort().values)
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "SupertuningConfig"):
        pytest.skip("needs a PEFT with Super-Tuning")
    for top, scores in ((True, large), (False, small)):
        model = torch.nn.Sequential(linear)
        options = {"target_modules": ["0"], "sparsity": 0.9, "select_top": top}
        layer: Any = peft.inject_adapter_in_model(peft.SupertuningConfig(**options), model)[0]
        index = layer.supertuning_indices["default"].long()
        taken = scores.double().flatten().topk(len(index)).values
        assert torch.equal(scores.double().flatten()[index].sort().values, taken.sort().values)


def test_ratios_of_bfloat16_weights_and_of_zeros() -> None:
    """Factors are formed in float32, and a weight of 0 with a gradient comes first."""
    weights = torch.nn.Parameter(torch.tensor([0.0, 0.5, -0.25, 0.0]).bfloat16())
    total = torch.tensor([0.3, 0.3, 0.3, 0.0])
    found = entry_scores("gem", {"w": weights}, {"w": total}, 0)["w"]
    torch.testing.assert_close(found, torch.tensor([3e7, 0.6, 1.2, 0.0]))
    assert entry_scores("gallop", {"w": weights}, {"w": total}, 0)["w"].tolist() == pytest.approx([0.3, 0, 0, 0])


def test_random_is_seeded_and_even() -> None:
    model, rows = tiny("bert"), samples()

    def mask(seed: int) -> Any:
        gradients = SampleGradients(model, rows, collate, scored_parameters(model), seed=seed)
        return ranked_entries_by_prefix(gradients, range(8), [8, 4], 1000, score="random")

    assert mask(0)[8].prefix(1000).hash == mask(0)[4].prefix(1000).hash != mask(1)[8].prefix(1000).hash
    chosen = mask(0)[8].prefix(1000)
    table = "bert.embeddings.word_embeddings.weight"
    share = 480 / sum(p.numel() for p in model.parameters())
    assert abs(len(chosen.indices[table]) - 1000 * share) < 5 * (1000 * share) ** 0.5


@pytest.mark.parametrize("score", ["saliency", "random"])
def test_traces_are_squares_whatever_the_score(score: Any) -> None:
    model, rows = tiny("bert"), samples()
    gradients = SampleGradients(model, rows, collate, scored_parameters(model), batch_size=3)
    expected, found = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    gradients.add_traces(range(8), expected)
    ranked_entries_by_prefix(gradients, range(8), [8], 10, score=score, traces=found)
    torch.testing.assert_close(found, expected)
