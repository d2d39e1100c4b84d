"""Tiny random models of each family, in memory, and ragged samples for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 40
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 12}
BERT_LIKE = SIZES | {"intermediate_size": 20, "max_position_embeddings": 24, "pad_token_id": 0}
LLAMA_LIKE = SIZES | {
    "intermediate_size": 20,
    "max_position_embeddings": 24,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def config_of(family: str, **more: Any) -> Any:
    """A configuration of a few thousand parameters."""
    if family == "bert":
        return transformers.BertConfig(**BERT_LIKE | more)
    if family == "roberta":
        return transformers.RobertaConfig(**BERT_LIKE | {"max_position_embeddings": 26} | more)
    if family == "distilbert":
        sizes = {"vocab_size": VOCABULARY, "dim": 12, "hidden_dim": 20, "n_layers": 2, "n_heads": 2}
        return transformers.DistilBertConfig(**sizes | {"max_position_embeddings": 24, "pad_token_id": 0} | more)
    if family == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 24}
        return transformers.GPT2Config(**sizes | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1} | more)
    if family == "llama":
        return transformers.LlamaConfig(**LLAMA_LIKE | more)
    if family == "albert":
        return transformers.AlbertConfig(**BERT_LIKE | {"embedding_size": 8} | more)
    if family == "deberta":
        return transformers.DebertaV2Config(
            **BERT_LIKE
            | {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
            | {"norm_rel_ebd": "layer_norm"}
            | more
        )
    raise ValueError(family)


FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama")


def tiny(family: str, head: str = "classification", seed: int = 0, **more: Any) -> Any:
    """A random float64 model with a `classification` (3 classes), `regression` or `lm` head, in evaluation mode."""
    torch.manual_seed(seed)
    if head == "classification":
        more |= {"num_labels": 3}
    elif head == "regression":
        more |= {"num_labels": 1, "problem_type": "regression"}
    config = config_of(family, **more)
    auto = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
    model = auto.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases start at 0 and norms at 1: random values make a wrong rule visible.
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def samples(head: str = "classification", count: int = 8, longest: int = 9, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged samples with repeated tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    rows = []
    for i in range(count):
        length = longest if i == 0 else int(draw(2, longest + 1, 1))
        tokens = draw(2, 12 if i % 2 else VOCABULARY, length)
        label: Any = int(draw(0, 3, 1))
        if head == "regression":
            label = float(torch.randn(1, generator=generator))
        elif head == "lm":
            label = tokens.tolist()
        rows.append({"input_ids": tokens.tolist(), "labels": label, "row": i})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad right with token 0; language model labels with -100."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    batch = {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
    }
    labels = [row["labels"] for row in rows]
    if isinstance(labels[0], list):
        labels = [padded(label, -100) for label in labels]
    batch["labels"] = torch.tensor(labels)
    if batch["labels"].is_floating_point():
        batch["labels"] = batch["labels"].double()
    return batch
