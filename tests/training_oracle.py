"""A whole training written out: dense AdamW with masked gradients, clipping, decay and rates, in one process."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from irdscale import Mask
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig, training_steps
from irdscale.models.build import build_model
from irdscale.tasks import Task
from irdscale.training.trainable import trained_densely
from irdscale.training.trainer import training_order
from tests.helpers import tiny_model
from tests.search.toy import write_config
from tests.sparse.oracle import MaskedAdamW, dense_masks, random_mask

NO_DROPOUT: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
}
# An epoch and a half of the toy's samples.
TRAIN = {"steps": 12, "batch_size": 8, "learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.5}


def toy(folder: Path, family: str, text: bool = False) -> Path:
    """A toy task with a model of this family, whose dropout is off; returns the configuration file.

    Args:
        text: a causal language model of the texts, instead of a classifier.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        path = write_config(folder)
        shutil.rmtree(folder / "model")
        tiny_model(family, folder / "model", causal=text, initializer_range=0.3, **NO_DROPOUT[family])  # type: ignore[arg-type]
        config = yaml.safe_load(path.read_text())
        config["train"] = {**TRAIN}
        if text:
            config["task"] |= {"kind": "causal-lm", "columns": {"text": ["text"]}, "metric": "perplexity"}
        path.write_text(yaml.safe_dump(config))
    return folder / "toy.yaml"


def changed(config: RunConfig, **train: Any) -> RunConfig:
    """The configuration with another training."""
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def mask_of(config: RunConfig, task: Task, share: float = 0.1) -> Mask:
    """A random mask of every parameter but the new head, and the keys' biases.

    Attention does not change with those: their gradients are rounding alone, which Adam makes large.
    """
    whole, new = build_model(changed(config, deepspeed=None), task, 0)
    idle = [n for n, _ in whole.named_parameters() if n.endswith(("key.bias", "c_attn.bias"))]
    return random_mask(whole, share, leave=(*new, *idle))


@dataclass
class Trained:
    """What a training came to: its losses and gradient norms [steps], and every parameter."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    before: dict[str, Tensor]


def oracle(config: RunConfig, task: Task, mask: Mask, seed: int) -> Trained:
    """Train the whole model and hold back what the mask does not hold; its head is trained whole.

    A model of lower precision computes with the rounded weights of a float32 one, which is what AdamW moves.
    """
    config = changed(config, deepspeed=None)
    model, new = build_model(config, task, seed)
    model.train().requires_grad_(True)
    train, steps = config.train, training_steps(config.train, len(task.train))
    head = trained_densely(config, model, new)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = dense_masks(model, mask, tuple(head))
    exact = copy.deepcopy(model).float() if config.model.dtype == "bfloat16" else model
    masks = {n: m.to(exact.get_parameter(n).dtype) for n, m in masks.items()}
    optimizer = MaskedAdamW(exact, masks, lr=0.0, weight_decay=train.weight_decay, decay=train.decay)
    if mask.k and train.max_head_rate is not None:
        optimizer.shares = dict.fromkeys(head, min(1.0, train.max_head_rate / train.learning_rate))
    for name in optimizer.start:
        if _undecayed(model, name):
            optimizer.start[name] = exact.get_parameter(name)
        elif name in head:
            optimizer.start[name] = torch.zeros_like(optimizer.start[name])
    trained = [n for n, m in masks.items() if bool(m.any())]
    order, losses, norms = training_order(len(task.train), steps * train.batch_size, seed), [], []
    warmup = round(train.warmup_ratio * steps)
    for step in range(steps):
        rows = [task.train[i] for i in order[step * train.batch_size : (step + 1) * train.batch_size]]
        model.zero_grad()
        loss = model(**task.collate(rows)).loss
        loss.backward()
        losses.append(loss.item())
        gradients = torch.cat([(model.get_parameter(n).grad * masks[n].to(loss.dtype)).reshape(-1) for n in trained])
        norms.append(float((gradients if gradients.dtype == torch.float64 else gradients.float()).norm()))
        clip = min(1.0, train.max_grad_norm / (norms[-1] + 1e-6))
        for name, p in model.named_parameters():
            if p.grad is not None:
                exact.get_parameter(name).grad = p.grad.to(masks[name].dtype) * clip
        optimizer.lr = train.learning_rate * (step / warmup if step < warmup else (steps - step) / (steps - warmup))
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(exact.get_parameter(name))
    return Trained(losses, norms, {n: p.detach().clone() for n, p in exact.named_parameters()}, masks, before)


def _undecayed(model: nn.Module, name: str) -> bool:
    """Biases and norms, which the Trainer leaves undecayed."""
    module = model.get_submodule(name.rpartition(".")[0])
    return "bias" in name or "Norm" in type(module).__name__


def load(path: Path, *changes: str) -> RunConfig:
    """The configuration of `toy`."""
    return copy.deepcopy(load_config(path, list(changes)))
