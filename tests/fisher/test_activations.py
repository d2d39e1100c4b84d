"""Scores by the inputs of linear layers, against the inputs of single samples without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from irdscale import Fisher, top_k
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.activations import input_sizes, of_linear_layers
from irdscale.fisher.nested import ranked_entries_by_prefix
from irdscale.fisher.pool import scored_of
from irdscale.fisher.scores import entry_scores
from tests.tiny_models import collate, samples, tiny

ORDER = [3, 1, 6, 0, 2, 5, 4]
CASES = [("bert", "classification"), ("gpt2", "lm"), ("llama", "lm"), ("albert", "regression")]


def by_hand(score: str, model: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """|W| times the norm, or the mean |x|, of each input, from all that each linear layer sees of each sample alone."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    seen: dict[str, list[Tensor]] = {name: [] for name in names.values()}
    hooks = [
        module.register_forward_hook(lambda m, x, _: seen[names[m]].append(x[0].detach().reshape(-1, x[0].shape[-1])))
        for module in names
    ]
    with torch.no_grad():
        for row in rows:
            model(**collate([row]))
    for hook in hooks:
        hook.remove()
    found = {}
    for module, name in names.items():
        x_NI = torch.cat(seen[name])
        size_I = torch.linalg.vector_norm(x_NI, dim=0) if score == "activation" else x_NI.abs().mean(0)
        weight = module.weight.detach().abs()
        found[f"{name}.weight"] = weight * (size_I if isinstance(module, nn.Linear) else size_I.unsqueeze(1))
    return found


def linear(model: Any, rows: list[dict[str, Any]], **options: Any) -> SampleGradients:
    scored = of_linear_layers(model, scored_parameters(model))
    return SampleGradients(model, rows, collate, scored, **{"batch_size": 3, **options})


@pytest.mark.parametrize("score", ["activation", "mean_activation"])
@pytest.mark.parametrize(("family", "head"), CASES)
def test_scores_are_those_of_the_definition(score: Any, family: str, head: str) -> None:
    model, rows = tiny(family, head), samples(head, count=7)
    gradients = linear(model, rows)
    found = input_sizes(gradients, ORDER, [7, 3], score, dtype=torch.float64)
    assert list(found) == [3, 7]
    for size, sizes in found.items():
        scores = entry_scores(score, gradients.scored, sizes, 0)
        expected = by_hand(score, model, [rows[i] for i in ORDER[:size]])
        # A tied head bears the name of the table.
        assert scores.keys() == gradients.scored.keys()
        assert len(scores) > 6
        for name, value in scores.items():
            wanted = expected["lm_head.weight" if "wte" in name else name]
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0, msg=name)
    assert gradients.taken == 0, "no gradients are taken"


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_masks_are_the_largest_scores(scope: Any) -> None:
    model, rows = tiny("gpt2", "lm"), samples("lm", count=7)
    gradients = linear(model, rows)
    traces = torch.zeros(7, dtype=torch.float64)
    options: dict[str, Any] = {"score": "activation", "scope": scope, "dtype": torch.float64, "traces": traces}
    rankings = ranked_entries_by_prefix(gradients, ORDER, [7, 3], 200, **options)
    for size in (7, 3):
        expected = by_hand("activation", model, [rows[i] for i in ORDER[:size]])
        scores = {name: expected["lm_head.weight" if "wte" in name else name] for name in gradients.scored}
        fisher = Fisher(scores, torch.zeros(0, dtype=torch.float64))
        assert rankings[size].prefix(200) == top_k(fisher, 200, scope)
    plain = torch.zeros(7, dtype=torch.float64)
    linear(model, rows).add_traces(range(7), plain)
    torch.testing.assert_close(traces, plain)


def test_only_weights_of_linear_layers_are_scored() -> None:
    model = tiny("bert")
    kept = of_linear_layers(model, scored_parameters(model))
    expected = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(kept) == sorted(expected)
    config = {"model": {"path": "x"}, "task": {"dataset": "x"}, "fisher": {"score": "activation"}}
    head = ["classifier.weight", "classifier.bias"]
    scored = scored_of(RunConfig.model_validate(config), model, head, False)
    assert sorted([*scored, "classifier.weight"]) == sorted(expected)
    config["fisher"] = {"score": "activation", "include": ["LayerNorm"]}
    message = (
        r"fisher.score: found activation with bert\.\S+LayerNorm\.weight and no linear layer's weight to score; expec"
    )
    with pytest.raises(InputError, match=message):
        scored_of(RunConfig.model_validate(config), model, head, False)


def test_a_parameter_without_inputs_is_refused_by_name() -> None:
    model = tiny("bert")
    gradients = SampleGradients(model, samples(), collate, scored_parameters(model))
    message = (
        r"bert.embeddings.word_embeddings.weight: found no inputs that it multiplies; expected the weight of a linear"
    )
    with pytest.raises(InputError, match=message):
        ranked_entries_by_prefix(gradients, range(8), [8], 10, score="activation")


def test_inputs_that_are_not_tokens_are_refused_by_name() -> None:
    """DeBERTa projects its relative positions with the same matrices as its tokens."""
    message = (
        r"deberta\.\S+_proj.weight: found an input of shape \[1, 8, 12\] for 2 samples of \d tokens; expected one vec"
    )
    # Of one sample of 8 tokens, the 8 relative positions look like them.
    rows = [{**row, "input_ids": [*row["input_ids"], *range(2, 10)][:8]} for row in samples(count=2)]
    with pytest.raises(InputError, match=message):
        input_sizes(linear(tiny("deberta"), rows, batch_size=1), range(2), [2], "activation")


def test_a_loss_that_is_not_finite_is_named() -> None:
    rows = samples("regression", count=4)
    rows[2] = {**rows[2], "labels": float("nan")}
    with pytest.raises(InputError, match=r"sample 2 \(row 2 of its split\): found a loss of nan"):
        input_sizes(linear(tiny("bert", "regression"), rows), range(4), [4], "activation")
