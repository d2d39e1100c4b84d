"""Tiny random models of the families in the support table of irdscale/fisher/README.md, and samples that fit them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.tiny_models import BERT_LIKE, LLAMA_LIKE, SIZES, VOCABULARY, config_of, samples

WIDE = LLAMA_LIKE | {"head_dim": 6}
EXPERTS = LLAMA_LIKE | {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 6}


def configs() -> dict[str, Any]:
    """Family name in the table -> configuration."""
    t = transformers
    return {
        "BERT": config_of("bert"),
        "RoBERTa": config_of("roberta"),
        "DistilBERT": config_of("distilbert"),
        "ALBERT": config_of("albert"),
        "DeBERTa-v2": config_of("deberta"),
        "ELECTRA": t.ElectraConfig(**BERT_LIKE, embedding_size=8),
        "ModernBERT": t.ModernBertConfig(
            **BERT_LIKE, cls_token_id=1, sep_token_id=1, bos_token_id=1, eos_token_id=1, local_attention=4
        ),
        "GPT-2": config_of("gpt2"),
        "GPT-NeoX": t.GPTNeoXConfig(**SIZES, intermediate_size=20, max_position_embeddings=24, pad_token_id=0),
        "OPT": t.OPTConfig(**SIZES, ffn_dim=20, max_position_embeddings=24, word_embed_proj_dim=12, pad_token_id=0),
        "BLOOM": t.BloomConfig(vocab_size=VOCABULARY, hidden_size=12, n_layer=2, n_head=2, pad_token_id=0),
        "Llama": config_of("llama"),
        "Mistral": t.MistralConfig(**WIDE, sliding_window=4),
        "Qwen2": t.Qwen2Config(**LLAMA_LIKE),
        "Qwen3": t.Qwen3Config(**WIDE),
        "Gemma": t.GemmaConfig(**WIDE),
        "Gemma 2": t.Gemma2Config(**WIDE, sliding_window=16, query_pre_attn_scalar=6),
        "Gemma 3": t.Gemma3TextConfig(**WIDE, sliding_window=4, query_pre_attn_scalar=6),
        "Phi-3": t.Phi3Config(**LLAMA_LIKE, bos_token_id=1, eos_token_id=1),
        "Mixtral": t.MixtralConfig(**LLAMA_LIKE | {"num_experts_per_tok": 2, "num_local_experts": 4}),
        "Qwen2-MoE": t.Qwen2MoeConfig(**LLAMA_LIKE, num_experts_per_tok=2, moe_intermediate_size=12, num_experts=4),
        "Qwen3-MoE": t.Qwen3MoeConfig(**EXPERTS, num_experts=4),
        "T5": t.T5Config(
            vocab_size=VOCABULARY,
            d_model=12,
            d_kv=6,
            d_ff=20,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            decoder_start_token_id=0,
        ),
    }


def classifier(config: Any, seed: int = 0) -> Any:
    """A float64 classifier of 3 classes whose every parameter matters."""
    torch.manual_seed(seed)
    config.num_labels = 3
    # grouped_mm, the usual way of experts, has no float64 on CPU.
    model = transformers.AutoModelForSequenceClassification.from_config(config, experts_implementation="eager")
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def rows_for(config: Any) -> list[dict[str, Any]]:
    """Ragged samples; T5 wants one end-of-sequence token, last, in each."""
    rows = samples(count=6)
    if config.model_type == "t5":
        for row in rows:
            row["input_ids"] = [token if token != 1 else 2 for token in row["input_ids"]] + [1]
    return rows
