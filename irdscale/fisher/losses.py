"""A sample's loss, and the losses whose squared gradients sum to an objective of the Fisher information.

A sample's loss equals the Hugging Face `.loss` of a batch of one: cross-entropy for classification, squared error for
regression, the mean (or sum) over its target tokens for causal language models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from irdscale.errors import InputError

Objective = Literal["label", "sampled", "expected"]
TokenReduction = Literal["mean", "sum"]
IGNORED = -100


def loss_kind(model: torch.nn.Module, logits: Tensor, labels: Tensor) -> str:
    """`regression`, `classification` or `causal-lm`, as transformers would choose from the same logits and labels.

    Raises:
        InputError: the model's loss is of another kind.
    """
    config = getattr(model, "config", None)
    if logits.dim() == 3 and labels.dim() == 2:
        if getattr(config, "is_encoder_decoder", False) or getattr(model, "loss_type", None) not in (
            None,
            "ForCausalLM",
        ):
            raise InputError(
                f"{type(model).__name__}: found token labels; expected a causal language model or a sequence classifier"
            )
        return "causal-lm"
    if logits.dim() != 2:
        raise InputError(f"{type(model).__name__}: found logits of shape {tuple(logits.shape)}; expected [B, classes]")
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification" or (problem is None and labels.dim() == 2 and logits.shape[1] > 1):
        raise InputError(f"{type(model).__name__}: found multi-label targets; expected one class or number a sample")
    if problem == "regression" or (problem is None and logits.shape[1] == 1):
        return "regression"
    if labels.is_floating_point():
        raise InputError(f"{type(model).__name__}: found labels of {labels.dtype}; expected integer classes")
    return "classification"


def sample_losses(kind: str, logits: Tensor, labels: Tensor, token_reduction: TokenReduction = "mean") -> Tensor:
    """Loss of each sample, shape [B], from logits [B, C] (or [B, T, V]) and labels [B] (or [B, T])."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if kind == "regression":
        return (logits.reshape(len(logits), -1) - labels.to(logits.dtype).reshape(len(logits), -1)).square().mean(1)
    if kind == "classification":
        return F.cross_entropy(logits, labels.reshape(-1), reduction="none")
    targets_BT = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    loss_BT = F.cross_entropy(logits.transpose(1, 2), targets_BT, reduction="none", ignore_index=IGNORED)
    total_B = loss_BT.sum(1)
    return total_B if token_reduction == "sum" else total_B / (targets_BT != IGNORED).sum(1)


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

    `label` yields the loss of the data's labels (the empirical Fisher). `sampled` draws one target per sample from
    the model, by the sample's index and not its place in a batch. `expected` yields one loss per class, scaled by
    the square root of its probability. A squared error is the negative log-likelihood of a normal distribution of
    variance 1/2, which gives both their targets for regression.
    """
    if objective == "label":
        assert labels is not None
        yield sample_losses(kind, logits, labels, token_reduction)
    elif objective == "sampled":
        targets = _draw_targets(kind, logits.detach(), labels, sample_indices, seed)
        yield sample_losses(kind, logits, targets, token_reduction)
    elif kind == "regression":
        # d/df (f - y)^2 = 2 (f - y), and E[(f - y)^2] = 1/2 under the model: E[g^2] = 2 (df)^2.
        flat_BC = logits.float().reshape(len(logits), -1) if logits.dtype == torch.bfloat16 else logits
        flat_BC = flat_BC.reshape(len(logits), -1)
        for c in range(flat_BC.shape[1]):
            yield flat_BC[:, c] * (2.0**0.5 / flat_BC.shape[1])
    elif kind == "classification":
        log_p_BC = F.log_softmax(logits.float() if logits.dtype == torch.bfloat16 else logits, dim=1)
        for c in range(log_p_BC.shape[1]):
            yield -log_p_BC[:, c] * (log_p_BC[:, c].detach() / 2).exp()
    else:
        raise InputError("fisher.objective: found 'expected'; expected 'label' or 'sampled' for a language model")


def _draw_targets(kind: str, logits: Tensor, labels: Tensor | None, indices: Sequence[int], seed: int) -> Tensor:
    def per_sample(draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        # A string seeds Python's generator through a hash of all its bytes; torch uses 32 bits of a seed.
        seeds = [random.Random(f"{seed}/{index}").getrandbits(32) for index in indices]
        return torch.stack([draw(torch.Generator().manual_seed(s)) for s in seeds]).to(logits.device)

    if kind == "regression":
        flat_BC = logits.reshape(len(logits), -1)
        noise_BC = per_sample(lambda g: torch.randn(flat_BC.shape[1], generator=g, dtype=torch.float64))
        return flat_BC + (noise_BC * 0.5**0.5).to(flat_BC.dtype)
    if kind == "classification":
        u_B1 = per_sample(lambda g: torch.rand(1, generator=g, dtype=torch.float64))
        return _inverse_cdf(logits, u_B1).squeeze(1)
    assert labels is not None
    length = labels.shape[1]
    u_BT1 = per_sample(lambda g: torch.rand(length, generator=g, dtype=torch.float64)).unsqueeze(2)
    predicted_BT = _inverse_cdf(logits, u_BT1).squeeze(2)
    drawn_BT = F.pad(predicted_BT[:, :-1], (1, 0), value=IGNORED)
    return torch.where(labels == IGNORED, labels, drawn_BT)


def _inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, u * cumulative[..., -1:]).clamp_max(logits.shape[-1] - 1)
