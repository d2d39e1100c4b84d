"""Random models and samples of the benchmarks; only their sizes matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.fisher import accumulate_fisher
from irdscale.masks.mask import Mask, top_k
from irdscale.sparse import sparsify

Step = Callable[[], None]
BATCH = 8
RATIO = 0.005
HEAD = r"^(classifier|score)\."


def make_model(name: str) -> Any:
    """A random classifier of 20-70M parameters, in evaluation mode (without dropout)."""
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
    labels = torch.stack([torch.as_tensor(row["labels"]) for row in rows])
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels}


def fisher_mask(name: str, rows: list[dict[str, Any]], top_half: bool = False) -> Mask:
    """The Fisher mask of a share `RATIO` of a model's parameters, outside the head."""
    model = make_model(name)
    layers = model.config.num_hidden_layers
    upper = "|".join(str(layer) for layer in range(layers // 2, layers))
    include = [rf"layers?\.({upper})\."] if top_half else None
    fisher = accumulate_fisher(model, rows, collate_fn=collate, include=include, exclude=HEAD)
    scored = sum(torch.Size(shape).numel() for shape in fisher.shapes.values())
    return top_k(fisher, min(scored, round(RATIO * sum(p.numel() for p in model.parameters()))))


def sparse_model(name: str, mask: Mask) -> Any:
    """A random classifier that trains the mask and the head."""
    return sparsify(make_model(name), mask, always_train=[HEAD])


def training_step(model: Any, batch: dict[str, Tensor], trains: bool = True) -> Step:
    """A function that makes one step: forward and backward pass, and fused AdamW if the model trains."""
    optimizer = adamw(model) if trains else None

    def step() -> None:
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW of the model's trained parameters."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
