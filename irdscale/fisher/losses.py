"""The loss of each sample from a model's logits, and the losses of each objective of the Fisher information.

A sample's loss equals the Hugging Face `.loss` of a batch of one: cross-entropy for classification, squared error for
regression, mean (or sum) over the target tokens for causal language models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from irdscale.errors import InputError
from irdscale.fisher.terms import wide
from irdscale.models.chunked_losses import (
    IGNORED,
    drawn_labels,
    generators,
    inverse_cdf,
    next_tokens,
    token_losses,
    uniform,
)

Objective = Literal["label", "sampled", "expected"]
TokenReduction = Literal["mean", "sum"]


def loss_kind(model: torch.nn.Module, logits: Tensor, labels: Tensor) -> str:
    """`regression`, `classification` or `causal-lm`, as transformers chooses from the same logits and labels.

    Raises:
        InputError: the model's loss is of another kind.
    """
    config, where = getattr(model, "config", None), type(model).__name__
    if logits.dim() == 3 and labels.dim() == 2:
        loss_type = getattr(model, "loss_type", None)
        if getattr(config, "is_encoder_decoder", False) or loss_type not in (None, "ForCausalLM"):
            raise InputError("found token labels", "a causal language model or a sequence classifier", where=where)
        return "causal-lm"
    if logits.dim() != 2:
        raise InputError(f"found logits of shape {tuple(logits.shape)}", "[B, classes]", where=where)
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification" or (problem is None and labels.dim() == 2 and logits.shape[1] > 1):
        raise InputError("found multi-label targets", "one class or number per sample", where=where)
    if problem == "regression" or (problem is None and logits.shape[1] == 1):
        return "regression"
    if labels.is_floating_point():
        raise InputError(f"found labels of {labels.dtype}", "integer classes", where=where)
    return "classification"


def sample_losses(kind: str, logits: Tensor, labels: Tensor, token_reduction: TokenReduction = "mean") -> Tensor:
    """Loss of each sample, shape [B], from logits [B, C] (or [B, T, V]) and labels [B] (or [B, T])."""
    if kind == "causal-lm":
        return reduced(token_losses(logits, next_tokens(labels)), labels, token_reduction)
    logits = wide(logits)
    if kind == "regression":
        return (logits.reshape(len(logits), -1) - labels.to(logits.dtype).reshape(len(logits), -1)).square().mean(1)
    return F.cross_entropy(logits, labels.reshape(-1), reduction="none")


def reduced(loss_BT: Tensor, labels: Tensor, token_reduction: TokenReduction) -> Tensor:
    """Loss of each text [B] from the losses [B, T] of its tokens."""
    total_B = loss_BT.sum(1)
    return total_B if token_reduction == "sum" else total_B / (next_tokens(labels) != IGNORED).sum(1)


def objective_losses(
    objective: Objective,
    kind: str,
    logits: Tensor,
    labels: Tensor | None,
    sample_indices: Sequence[int],
    seed: int = 0,
    token_reduction: TokenReduction = "mean",
) -> Iterator[Tensor]:
    """Yield losses [B]; the sum of their squared per-sample gradients is the objective's Fisher information.

    `label` yields the loss of the data's labels (the empirical Fisher). `sampled` draws one target per sample from the
    model, by the sample's index. `expected` yields one loss per class, scaled by the square root of the class's
    probability. For regression, targets of the last two follow a normal distribution of variance 1/2, whose negative
    log-likelihood is the squared error.
    """
    if objective == "label":
        assert labels is not None
        yield sample_losses(kind, logits, labels, token_reduction)
    elif objective == "sampled":
        targets = _draw_targets(kind, logits.detach(), labels, sample_indices, seed)
        yield sample_losses(kind, logits, targets, token_reduction)
    elif kind == "regression":
        # d/df (f - y)^2 = 2 (f - y), and E[(f - y)^2] = 1/2 under the model: E[g^2] = 2 (df)^2.
        flat_BC = wide(logits).reshape(len(logits), -1)
        for c in range(flat_BC.shape[1]):
            yield flat_BC[:, c] * (2.0**0.5 / flat_BC.shape[1])
    elif kind == "classification":
        log_p_BC = F.log_softmax(wide(logits), dim=1)
        for c in range(log_p_BC.shape[1]):
            yield -log_p_BC[:, c] * (log_p_BC[:, c].detach() / 2).exp()
    else:
        expected = "'label' or 'sampled' for a language model"
        raise InputError("found 'expected'", expected, key="fisher.objective")


def _draw_targets(kind: str, logits: Tensor, labels: Tensor | None, indices: Sequence[int], seed: int) -> Tensor:
    if kind == "regression":
        flat_BC = logits.reshape(len(logits), -1)
        drawn = [torch.randn(flat_BC.shape[1], generator=g, dtype=torch.float64) for g in generators(indices, seed)]
        noise_BC = torch.stack(drawn).to(logits.device, non_blocking=True)
        return flat_BC + (noise_BC * 0.5**0.5).to(flat_BC.dtype)
    if kind == "classification":
        return inverse_cdf(logits, uniform(indices, 1, seed).to(logits.device, non_blocking=True)).squeeze(1)
    assert labels is not None
    u_BT1 = uniform(indices, labels.shape[1], seed).to(logits.device, non_blocking=True).unsqueeze(2)
    return drawn_labels(inverse_cdf(logits, u_BT1).squeeze(2), labels)
