"""Bytes of passes on the meta device, against sizes worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from irdscale.fisher.accumulate import scored_parameters
from irdscale.memory import pass_bytes
from irdscale.memory.pass_bytes import pass_bytes_of
from irdscale.memory.sizes import PassSetting
from tests.tiny_models import config_of

B, T, D = 3, 11, 12


def meta(family: str, head: str = "classification", **more: Any) -> Any:
    auto = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
    with torch.device("meta"):
        return auto.from_config(config_of(family, **more)).eval()


def setting(**changes: Any) -> PassSetting:
    given: dict[str, Any] = {"batch": B, "tokens": T, "ratio": 0.1, "checkpointing": False, "language": False}
    return PassSetting(**given | {"memory": None, "scattered": True} | changes)


@pytest.mark.parametrize("kind", ["train", "masks", "traces"])
def test_a_checkpointed_layer_keeps_its_input(kind):
    few, more = (
        pass_bytes_of(model, scored_parameters(model), kind, setting(checkpointing=True))
        for model in (meta("llama", num_hidden_layers=layers) for layers in (2, 3))
    )
    assert more.saved - few.saved == 4 * B * T * D


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("kind", ["train", "masks", "traces", "evaluate"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_are_not_run_are_extrapolated(family, kind, checkpointing, monkeypatch):
    model = meta(family, num_hidden_layers=7)
    scored = {n: p for n, p in scored_parameters(model).items() if "layer" in n}
    found = pass_bytes_of(model, scored, kind, setting(checkpointing=checkpointing))
    monkeypatch.setattr(pass_bytes, "MORE", 7)
    assert found == pass_bytes_of(model, scored, kind, setting(checkpointing=checkpointing))


def test_the_model_is_left_as_it_was():
    model = meta("llama", "lm", num_hidden_layers=5)
    names, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    for kind in ("train", "masks", "traces", "evaluate"):
        pass_bytes_of(
            model, scored_parameters(model, r"proj\.weight$"), kind, setting(checkpointing=True, language=True)
        )
    assert list(model.state_dict()) == names
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not model.is_gradient_checkpointing
    assert not any(m._forward_hooks or m.training for m in model.modules())


def test_logits_of_long_texts_are_never_there_at_once():
    model = meta("llama", "lm", vocab_size=100_000, max_position_embeddings=4096, num_hidden_layers=1)
    scored = scored_parameters(model, r"proj\.weight$")
    # 2^24 // 100,000 tokens at a time: their logits; in training the logarithms and a gradient too.
    part = 4 * 167 * 100_000
    for kind, times in (("train", 3), ("masks", 3), ("evaluate", 1)):
        found = pass_bytes_of(model, scored, kind, setting(batch=1, tokens=4096, language=True))
        assert times * part < found.peak < (times + 0.2) * part


def test_no_matrix_of_tokens_by_tokens_is_kept():
    model = meta("llama", "lm", max_position_embeddings=8192, num_hidden_layers=1, vocab_size=40)
    scored = scored_parameters(model, r"proj\.weight$")
    short, long = (
        pass_bytes_of(model, scored, "train", setting(batch=1, tokens=tokens, language=True)) for tokens in (2048, 4096)
    )
    assert long.saved == pytest.approx(2 * short.saved, rel=0.01)
    # A padded batch has its mask, of a byte and in the type of the weights.
    padded = pass_bytes_of(model, scored, "train", setting(batch=2, tokens=2048, language=True))
    assert padded.saved - 2 * short.saved == pytest.approx(2 * 2048**2 * 5, rel=0.02)


def test_a_gpu_forms_no_gradients_of_samples():
    model = meta("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=4096)
    scored = scored_parameters(model, r"proj\.weight$")
    cpu, gpu = (
        pass_bytes_of(model, scored, "masks", setting(batch=1, tokens=4, memory=memory)) for memory in (None, 2**30)
    )
    assert cpu.peak - gpu.peak >= 4 * 64 * 4096


def test_a_mask_that_concentrates_keeps_few_columns_of_inputs():
    model = meta("llama", num_hidden_layers=3, hidden_size=64, intermediate_size=200, num_attention_heads=4)
    scored = scored_parameters(model, r"proj\.weight$")
    few, every = (
        pass_bytes_of(model, scored, "train", setting(ratio=0.0025, scattered=scattered)) for scattered in (False, True)
    )
    # A fifth of the columns: 13 of 64 in each of six products' inputs, 40 of 200 in the last's; whole ones are shared:
    # by q, k and v, by gate and up. The attention's output is kept anyway.
    assert every.saved - few.saved == 3 * 4 * B * T * (64 + 64 + 200 - 6 * 13 - 40)
