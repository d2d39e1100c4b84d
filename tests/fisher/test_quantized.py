"""Fisher information of quantised weights: that of the matrices that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import irdscale
from irdscale.fisher import SampleGradients, passes, scored_parameters
from irdscale.fisher.nested import ranked_entries_by_prefix
from irdscale.fisher.scores import entry_scores
from irdscale.models.quantized import adopt
from irdscale.utils.quantized import is_quantized
from tests.fisher.oracle import brute_force
from tests.quantized import KINDS, dense, loaded, needs_bitsandbytes, saved
from tests.tiny_models import collate, samples

pytestmark = needs_bitsandbytes


def _close(found: irdscale.Fisher, diagonal: dict[str, torch.Tensor], traces: torch.Tensor) -> None:
    assert set(found.diagonal) == set(diagonal)
    for name, expected in diagonal.items():
        assert found.diagonal[name].shape == expected.shape, name
        torch.testing.assert_close(found.diagonal[name], expected, rtol=2e-4, atol=1e-6 * float(expected.max()) + 1e-12)
    torch.testing.assert_close(found.sample_trace, traces.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_diagonal_and_traces_are_those_of_the_dequantised_model(kind: str, family: str, tmp_path: Path) -> None:
    folder, rows = saved(tmp_path, family), samples("lm")
    model, oracle = loaded(folder, kind), dense(folder, kind)
    found = irdscale.accumulate_fisher(model, rows, collate_fn=collate, batch_size=3)
    diagonal, traces = brute_force(oracle, rows)
    if family == "gpt2":
        # The quantised weight of a Conv1D is its transpose.
        quantized = {name for name, p in model.named_parameters() if is_quantized(p)}
        diagonal = {name: d.t() if name in quantized else d for name, d in diagonal.items()}
    assert any(is_quantized(p) for p in model.parameters())
    _close(found, diagonal, traces)


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_at_a_time_gives_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows = saved(tmp_path), samples("lm")
    expected = irdscale.accumulate_fisher(loaded(folder, kind), rows, collate_fn=collate)
    monkeypatch.setattr(passes, "why_no_rules", lambda *_: "a reason")
    found = irdscale.accumulate_fisher(loaded(folder, kind), rows, collate_fn=collate)
    _close(found, expected.diagonal, expected.sample_trace)


def test_classes_in_expectation_one_sample_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows = saved(tmp_path, head="classification"), samples()
    options: dict[str, Any] = {"collate_fn": collate, "objective": "expected"}
    expected = irdscale.accumulate_fisher(loaded(folder, "nf4", head="classification"), rows, **options)
    monkeypatch.setattr(passes, "why_no_rules", lambda *_: "a reason")
    found = irdscale.accumulate_fisher(loaded(folder, "nf4", head="classification"), rows, **options)
    _close(found, expected.diagonal, expected.sample_trace)


def test_gradient_checkpointing_gives_the_same(tmp_path: Path) -> None:
    folder, rows = saved(tmp_path), samples("lm")
    expected = irdscale.accumulate_fisher(loaded(folder, "nf4"), rows, collate_fn=collate)
    model = loaded(folder, "nf4")
    model.gradient_checkpointing_enable()
    found = irdscale.accumulate_fisher(model, rows, collate_fn=collate)
    _close(found, expected.diagonal, expected.sample_trace)


def test_sums_in_main_memory_and_a_bfloat16_base(tmp_path: Path) -> None:
    folder, rows = saved(tmp_path), samples("lm")
    found = irdscale.accumulate_fisher(loaded(folder, "nf4", torch.bfloat16), rows, collate_fn=collate, offload=True)
    oracle = dense(folder, "nf4", torch.bfloat16)
    expected = irdscale.accumulate_fisher(oracle, rows, collate_fn=collate)
    for name, diagonal in expected.diagonal.items():
        torch.testing.assert_close(found.diagonal[name], diagonal, rtol=1e-3, atol=1e-4 * float(diagonal.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_by_weight_are_those_of_the_dequantised_matrix(kind: str, tmp_path: Path) -> None:
    model, oracle = loaded(saved(tmp_path), kind), dense(tmp_path, kind)
    found = entry_scores("magnitude", scored_parameters(model), {}, 0)
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach().abs(), rtol=0, atol=0)


@pytest.mark.parametrize("score", ["activation", "gem", "gallop"])
def test_other_scores_are_those_of_the_dequantised_matrix(score: Any, tmp_path: Path) -> None:
    rows, masks = samples("lm", count=4), []
    for model in (loaded(saved(tmp_path), "nf4"), dense(tmp_path, "nf4")):
        gradients = SampleGradients(adopt(model), rows, collate, scored_parameters(model, r"layers.*proj\.weight"), 2)
        masks.append(ranked_entries_by_prefix(gradients, range(4), [4], 50, score=score, dtype=torch.float64)[4])
    entries = [{*zip(one.parameter.tolist(), one.index.tolist(), strict=True)} for one in masks]
    assert len(entries[0] & entries[1]) >= 49, "but for one near tie"
