"""Tiny random models and tokenizers, saved like pretrained ones, for tests that need a real folder."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any, Literal

Family = Literal["bert", "roberta", "distilbert", "gpt2", "llama"]
FAMILIES: tuple[Family, ...] = ("bert", "roberta", "distilbert", "gpt2", "llama")

# The order gives each family's usual ids: RoBERTa pads with 1, the others' pad token is 0 or absent.
_SPECIAL: dict[str, dict[str, str]] = {
    "bert": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    "roberta": {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"},
    "gpt2": {"eos_token": "<|endoftext|>", "unk_token": "<unk>"},
    "llama": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
}
_SPECIAL["distilbert"] = _SPECIAL["bert"]
_TEMPLATE = {
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "distilbert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "llama": ("<s> $A", "<s> $A <s> $B"),
}
_WORDS = [
    "the",
    "a",
    "an",
    "of",
    "to",
    "and",
    "in",
    "is",
    "was",
    "not",
    "it",
    "that",
    "this",
    "for",
    "on",
    "with",
    "as",
    "good",
    "bad",
    "film",
    "movie",
    "man",
    "dog",
    "said",
    "he",
    "she",
]


def tiny_tokenizer(folder: Path, family: Family = "bert", special: dict[str, str] | None = None) -> Any:
    """Save a lower-case WordPiece tokenizer of some words and all ASCII letters, digits and marks; returns it.

    Args:
        special: the special tokens by role, instead of the family's own; `{}` is a tokenizer without any.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    roles = _SPECIAL[family] if special is None else special
    characters = [c for c in string.printable if c.isprintable() and c != " " and not c.isupper()]
    tokens = [*roles.values(), *characters, *(f"##{c}" for c in characters), *_WORDS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    unknown = roles.get("unk_token", characters[0])
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if special is None and family in _TEMPLATE:
        single, pair = _TEMPLATE[family]
        ids = [(token, vocabulary[token]) for token in roles.values()]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    saved.save_pretrained(folder)
    return saved


def tiny_model(family: Family, folder: Path, *, seed: int = 0, causal: bool = False, **config: Any) -> Path:
    """Save a random headless model of `family`, width 16 and 2 layers, with its tokenizer, in `folder`; returns it.

    Args:
        causal: a causal language model, with its head.
        config: overrides of the transformers configuration, under the family's own names.
    """
    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        BertConfig,
        DistilBertConfig,
        GPT2Config,
        LlamaConfig,
        PretrainedConfig,
        RobertaConfig,
    )

    tokenizer = tiny_tokenizer(folder, family)
    ids = {
        role: getattr(tokenizer, role)
        for role in ("pad_token_id", "bos_token_id", "eos_token_id")
        if getattr(tokenizer, role) is not None
    }
    bert_like: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    chosen: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
        "bert": (BertConfig, bert_like),
        "roberta": (RobertaConfig, {**bert_like, "max_position_embeddings": 66, "type_vocab_size": 1}),
        "distilbert": (
            DistilBertConfig,
            {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64},
        ),
        "gpt2": (
            GPT2Config,
            {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": tokenizer.eos_token_id},
        ),
        "llama": (LlamaConfig, {**bert_like, "num_key_value_heads": 1}),
    }
    kind, sizes = chosen[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kind(**{"vocab_size": len(tokenizer), **ids, **sizes, **config})
        auto: Any = AutoModelForCausalLM if causal else AutoModel
        auto.from_config(made).save_pretrained(folder)
    return folder


def step_of(state: Path) -> int:
    """The step of a saved state; 0 while there is none, or it is being replaced."""
    try:
        return int(json.loads(state.read_text())["step"])
    except (OSError, ValueError):
        return 0
