"""Causal language models of the families in irdscale/fisher/README.md: their decoder blocks' Fisher information."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers

from irdscale import accumulate_fisher
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.models.build import decoder_linears
from tests.fisher.families import configs
from tests.fisher.oracle import brute_force
from tests.tiny_models import collate, samples

FAMILIES = (
    "GPT-2",
    "GPT-NeoX",
    "OPT",
    "BLOOM",
    "Llama",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "Gemma 2",
    "Gemma 3",
    "Phi-3",
    "Mixtral",
    "Qwen2-MoE",
    "Qwen3-MoE",
)
# Do more with their logits than their head, by their usual configuration.
WHOLE = ("Gemma 2",)
# Compute their attention's softmax in float32 whatever the model's type.
SOFTMAX_FLOAT32 = ("BLOOM", "Gemma 2")


def language_model(config: Any) -> Any:
    torch.manual_seed(0)
    # grouped_mm, the usual way of experts, has no float64 on CPU.
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_equal_brute_force(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, rows = language_model(configs()[family]), samples("lm", count=5)
    names = decoder_linears(model)
    assert names
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    assert not embeddings & {id(model.get_parameter(name)) for name in names}
    include = [f"^{name}$" for name in names]
    with caplog.at_level(logging.WARNING):
        fisher = accumulate_fisher(model, rows, collate_fn=collate, dtype=torch.float64, include=include, batch_size=2)
    gradients = SampleGradients(model, rows, collate, scored_parameters(model, include), batch_size=2)
    gradients.prepare(range(len(rows)))
    assert (gradients.loss.headless is None) == (family in WHOLE), caplog.text
    expected, _ = brute_force(model, rows)
    for name in names:
        largest = float(expected[name].max())
        close = {"rtol": 1e-5, "atol": 1e-6 * largest} if family in SOFTMAX_FLOAT32 else {"rtol": 1e-9, "atol": 1e-16}
        torch.testing.assert_close(fisher.diagonal[name], expected[name], **close, msg=lambda m, n=name: f"{n}: {m}")
