"""Tiny models on quantised bases, and the dense models that they stand for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.models.quantized import make_plain

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (irdscale[quantize])"
)
KINDS = ("nf4", "int8")


def saved(folder: Path, family: str = "llama", head: str = "lm", **more: Any) -> Path:
    """A random float32 model with a few thousand parameters, saved like a pretrained one."""
    from tests.tiny_models import tiny

    sizes = {"hidden_size": 32, "intermediate_size": 48} if family != "gpt2" else {"n_embd": 32}
    tiny(family, head, **sizes | more).float().save_pretrained(folder)
    return folder


def loaded(folder: Path, kind: str, dtype: torch.dtype = torch.float32, head: str = "lm") -> Any:
    """The saved model as transformers loads it with bitsandbytes."""
    import transformers

    options: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    auto: Any = transformers.AutoModelForCausalLM
    if head != "lm":
        auto = transformers.AutoModelForSequenceClassification
        options["llm_int8_skip_modules"] = ["score", "classifier"]
    made = transformers.BitsAndBytesConfig(**options)
    return auto.from_pretrained(folder, quantization_config=made, dtype=dtype).eval()


def dense(folder: Path, kind: str, dtype: torch.dtype = torch.float32, head: str = "lm") -> Any:
    """The plain model of the dequantised weights, trainable."""
    return make_plain(loaded(folder, kind, dtype, head)).requires_grad_(True)


def random_entries(config: Any, task: Any) -> Any:
    """A random mask of every parameter of a configuration's model, in its shapes before it is quantised."""
    from tests.training_oracle import mask_of

    return mask_of(config.model_copy(update={"model": config.model.model_copy(update={"quantize": None})}), task)


def on_ranks(rank: int, world: int, folder: str, stages: list[int | None]) -> None:
    """Train and score a toy's quantised model on ranks; rank 0 writes what came out, by stage."""
    from irdscale import accumulate_fisher
    from irdscale.models.build import build_model
    from irdscale.sparse import base_hash, trained_numbers
    from irdscale.tasks import load_task
    from irdscale.training.trainable import sparse_model
    from irdscale.training.trainer import fine_tune
    from tests.training_oracle import changed, load
    from tests.training_ranks import Losses, group, settings_file

    with group(rank, world, folder):
        config = load(Path(folder) / "llama" / "toy.yaml", "model.quantize=nf4")
        task = load_task(config)
        found: dict[str, Any] = {}
        for layout in ("replicated", "sharded"):
            fisher = accumulate_fisher(
                build_model(config, task, 0)[0], task.train.select(range(7)), collate_fn=task.collate, layout=layout
            )
            found[layout] = {name: part.clone() for name, part in fisher.gather().items()}, fisher.sample_trace
        for stage in stages:
            other = config if stage is None else changed(config, deepspeed=settings_file(Path(folder), stage))
            model = sparse_model(other, task, random_entries(config, task), 3)
            losses = Losses(model)
            fine_tune(model, task, other, 3)
            of_steps = losses.of_steps(1, task.is_language)
            found[f"stage {stage}"] = of_steps, trained_numbers(model)[0], base_hash(model)
        if rank == 0:
            torch.save(found, Path(folder) / f"found-{world}.pt")
