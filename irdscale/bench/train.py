"""Sparse training steps against full fine-tuning, LoRA and the limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from irdscale.bench.models import collate, make_model, make_rows
from irdscale.bench.timing import row, side_by_side
from irdscale.errors import InputError
from irdscale.fisher import accumulate_fisher
from irdscale.mask import top_k
from irdscale.sparse import entries_of, sparsify

MODELS = ("bert", "llama")
REPEATS = 9
RATIO = 0.005
HEAD = r"^(classifier|score)\."


def bench_train(advance: Callable[..., None]) -> list[dict[str, Any]]:
    """Rows of every model."""
    rows = []
    tokens = 128
    for name in MODELS:
        data = make_rows(tokens)
        batch = collate(data)
        full, limit, sparse, lora = make_model(name), make_model(name), make_model(name), make_model(name)
        fisher = accumulate_fisher(sparse, data, collate_fn=collate, exclude=HEAD)
        sparsify(sparse, top_k(fisher, round(RATIO * sum(p.numel() for p in sparse.parameters()))), always_train=[HEAD])
        steps = {
            "sparse": _step(sparse, batch),
            "full": _step(full, batch),
            "limit": _limit(limit, batch),
            "lora": _step(_with_lora(lora, name), batch),
        }
        assert all(entries.values.requires_grad for entries in entries_of(sparse).values())
        seconds = side_by_side(steps, REPEATS)
        for what, under, bound in (
            ("sparse step / full fine-tuning step", "full", 0.85),
            ("sparse step / LoRA r=8 step (PEFT)", "lora", 1.0),
            ("sparse step / the limit (forward + input gradients)", "limit", 1.2),
        ):
            rows.append(row("train", what, name, tokens, seconds, "sparse", under, limit=bound))
        advance()
    return rows


def _step(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()

    return step


def _limit(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and input gradients, nothing trainable: what no training of these layers can beat."""
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_().clone())

    def step() -> None:
        model(**batch).loss.backward()

    return step


def _with_lora(model: Any, name: str) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("bench train: found no peft; expected it installed (pip install 'irdscale[bench]')") from None
    targets = {
        "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
        "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=targets[name])).eval()
