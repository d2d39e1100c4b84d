"""The models and samples of the benchmarks: random, as only their sizes count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BATCH = 8


def make_model(name: str) -> Any:
    """A random classifier of 20-70M parameters, in evaluation mode (dropout would differ between the measured)."""
    import transformers

    torch.manual_seed(0)
    if name == "bert":
        config: Any = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
    elif name == "gpt2":
        config = transformers.GPT2Config(n_embd=384, n_layer=6, n_head=12, n_positions=128, pad_token_id=0)
    else:
        config = transformers.LlamaConfig(
            hidden_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
            intermediate_size=1376,
            pad_token_id=0,
        )
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def make_rows(tokens: int, count: int = BATCH, seed: int = 0) -> list[dict[str, Any]]:
    """Random samples of equal length."""
    generator = torch.Generator().manual_seed(seed)
    ids_NT = torch.randint(5, 30_000, (count, tokens), generator=generator)
    return [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(ids_NT)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of samples of equal length."""
    ids_BT = torch.stack([row["input_ids"] for row in rows])
    labels_B = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels_B}
