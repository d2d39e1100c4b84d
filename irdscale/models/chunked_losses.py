"""Token losses of a language model, without the logits of all tokens at once.

A head maps hidden states [B, T, D] to logits [B, T, V]. For a vocabulary of 128k, the logits of 4096 tokens take 2 GiB
in float32, and their gradient 2 GiB more. Here only a few tokens' logits exist at a time. With a frozen head, the
gradient of each hidden state is computed together with the loss, so no logits are computed twice. A trained head runs
again in the backward pass.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from irdscale.distributed.zero3 import device_of, shape_of
from irdscale.models.batches import FIRST, by_token, moved, rows_of

log = logging.getLogger(__name__)

IGNORED = -100
# Key of the places with targets in a batch of texts (see `target_places`), which is no input of the model.
PLACES = "target_places"
# Logits that exist at a time on a CPU: 64 MiB in float32.
ENTRIES = 2**24
# On a GPU, logits that exist at a time take 1 / GPU_SHARE of its memory: fewer would read the head too often.
GPU_SHARE = 64
# Bytes of one logit: in 16 bits, in float32, as a log-probability, and both gradients.
LOGIT_BYTES = 16
# Largest relative difference between losses by the head alone and those of the model's logits.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def next_tokens(labels_BT: Tensor) -> Tensor:
    """The target of each place, which is the label of the next place; the last has none."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


@dataclass(frozen=True)
class Headless:
    """The parts of a causal language model: the body that computes hidden states, and the head over them."""

    body: nn.Module
    head: nn.Module

    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """Hidden states [B, T, D], the input of the head."""
        output = self.body(**inputs)
        found = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        assert isinstance(found, Tensor)
        return found


def headless(model: nn.Module, batch: dict[str, Any]) -> Headless | None:
    """The parts of a causal language model whose logits are its head's output; None for other models.

    Some models change their logits (soft caps, scales), so the losses of both ways are compared on the beginning of the
    first sample of `batch` (collated). A ZeRO-3 model must be inside `gathering`, and the call is then collective.
    """
    body: Any = getattr(model, "base_model", None)
    outputs: Any = getattr(model, "get_output_embeddings", None)
    head = None if outputs is None else outputs()
    if not isinstance(body, nn.Module) or body is model or not isinstance(head, nn.Linear):
        return None
    found = Headless(body, head)
    sample = beginning(moved(rows_of(batch, slice(1)), device_of(model)))
    sample.pop("labels", None)
    with torch.no_grad(), own_forward(model):
        own_BTV = model(**sample).logits
        hidden_BTD = found.hidden(sample)
        if own_BTV.shape[:2] != hidden_BTD.shape[:2]:
            return None
        labels_BT = sample["input_ids"]
        expected_BT = token_losses(own_BTV, next_tokens(labels_BT))
        losses_BT = found_losses(head, hidden_BTD, next_tokens(labels_BT))
    scale = float(expected_BT.abs().max()) + 1.0
    tolerance = TOLERANCE.get(own_BTV.dtype, 2e-2)
    if float((losses_BT - expected_BT).abs().max()) > tolerance * scale:
        log.warning(
            "%s does more than its head to its logits: the logits of all tokens of a batch are in memory at once",
            type(model).__name__,
        )
        return None
    return found


def beginning(batch: dict[str, Any]) -> dict[str, Any]:
    """The first tokens of a collated batch of texts, for checks of the model."""
    return by_token(batch, lambda x_BT: x_BT[:, :FIRST])


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """The model's own forward inside, even within `finishing`."""
    other = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if other is not None:
            vars(model)["forward"] = other


@contextmanager
def finishing(model: nn.Module, parts: Headless, finish: Callable[..., Any]) -> Iterator[None]:
    """`model(**inputs)` returns `finish(hidden)` instead of logits inside.

    `finish` runs inside the model's forward pass, where wrappers of the model expect its modules to run.

    Args:
        finish: also gets `labels`, `num_items_in_batch` and `PLACES` by name if they are among the inputs
    """

    def forward(**inputs: Any) -> Any:
        extra = {key: inputs.pop(key) for key in ("labels", "num_items_in_batch", PLACES) if key in inputs}
        return finish(parts.hidden(inputs), **extra)

    with own_forward(model):
        vars(model)["forward"] = forward
        try:
            yield
        finally:
            vars(model).pop("forward")


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each target [B, T] in float32 at least; 0 for places without target."""
    return _row_losses(logits_BTV.flatten(0, 1), targets_BT.flatten()).view(targets_BT.shape)


def _row_losses(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    # Classes are the last dimension; a softmax over another one is about a thousand times slower on GPUs.
    logits_NV = logits_NV.float() if logits_NV.dtype in (torch.bfloat16, torch.float16) else logits_NV
    return F.cross_entropy(logits_NV, targets_N, reduction="none", ignore_index=IGNORED)


def target_places(labels_BT: Tensor) -> Tensor:
    """Flat places [K] of a batch that have a target, from labels on the CPU, since counting on a GPU waits for it."""
    return (next_tokens(labels_BT) != IGNORED).flatten().nonzero().squeeze(1)


def found_losses(head: nn.Module, hidden_BTD: Tensor, targets_BT: Tensor, places_K: Tensor | None = None) -> Tensor:
    """`token_losses` of the head's logits, a few tokens at a time.

    Args:
        places_K: flat places that have a target; finding them here waits for the device
    """
    hidden_ND, targets_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
    kept = (targets_N != IGNORED).nonzero().squeeze(1) if places_K is None else places_K
    if len(kept) == 0:
        return (hidden_BTD * 0).sum(-1)
    hidden_KD, targets_K = hidden_ND.index_select(0, kept), targets_N.index_select(0, kept)
    if not torch.is_grad_enabled():
        losses_K = _in_parts(head, partial(_losses, head), hidden_KD, targets_K)
    elif any(p.requires_grad for p in head.parameters()):
        again = partial(checkpoint, _losses, head, use_reentrant=False)
        losses_K = _in_parts(head, again, hidden_KD, targets_K)
    else:
        losses_K = _FrozenHead.apply(hidden_KD, targets_K, head)
    return losses_K.new_zeros(len(targets_N)).index_copy(0, kept, losses_K).view(targets_BT.shape)


def measured_tokens(head: nn.Module, hidden_BTD: Tensor, targets_BT: Tensor, places_K: Tensor) -> tuple[Tensor, Tensor]:
    """`token_losses` [B, T], and whether the most likely token is the target (bool [B, T]), without gradients.

    Args:
        places_K: flat places that have a target; other places get 0 and False
    """

    def measure(hidden_nD: Tensor, targets_n: Tensor) -> Tensor:
        logits_nV = head(hidden_nD)
        losses_n = _row_losses(logits_nV, targets_n)
        return torch.stack([losses_n, (logits_nV.argmax(-1) == targets_n).to(losses_n.dtype)], 1)

    with torch.no_grad():
        hidden_KD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, places_K)
        found_K2 = _in_parts(head, measure, hidden_KD, targets_BT.reshape(-1).index_select(0, places_K))
        losses_N, right_N = found_K2.new_zeros(targets_BT.numel(), 2).index_copy(0, places_K, found_K2).unbind(1)
    return losses_N.view(targets_BT.shape), right_N.view(targets_BT.shape).bool()


def drawn_tokens(head: nn.Module, hidden_BTD: Tensor, labels_BT: Tensor, indices: Sequence[int], seed: int) -> Tensor:
    """Labels [B, T] drawn from the model by each sample's index, in places that have labels."""
    u_BT = uniform(indices, labels_BT.shape[1], seed).to(labels_BT.device, non_blocking=True)
    with torch.no_grad():
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        draw = lambda h, u: inverse_cdf(head(h), u.unsqueeze(1)).squeeze(1)  # noqa: E731
        drawn_N = _in_parts(head, draw, hidden_ND, u_BT.reshape(-1))
    return drawn_labels(drawn_N.view(labels_BT.shape), labels_BT)


def drawn_labels(drawn_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Each place's drawn next token as the label of the next place, in places that have labels."""
    return torch.where(labels_BT == IGNORED, labels_BT, F.pad(drawn_BT[:, :-1], (1, 0), value=IGNORED))


def uniform(indices: Sequence[int], count: int, seed: int) -> Tensor:
    """Random numbers in [0, 1), float64 [len(indices), count]; each row is a function of its index and the seed."""
    return torch.stack([torch.rand(count, generator=g, dtype=torch.float64) for g in generators(indices, seed)])


def generators(indices: Sequence[int], seed: int) -> list[torch.Generator]:
    """A random generator for each sample, by its index and the seed."""
    # Python's generator hashes all bytes of a string; torch uses 32 bits of a seed.
    seeds = [random.Random(f"{seed}/{index}").getrandbits(32) for index in indices]
    return [torch.Generator().manual_seed(s) for s in seeds]


def inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:
    """The class at which the cumulative probability exceeds u: logits [.., V], u [.., 1] -> [.., 1]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, u * cumulative[..., -1:]).clamp_max(logits.shape[-1] - 1)


def _losses(head: nn.Module, hidden_KD: Tensor, targets_K: Tensor) -> Tensor:
    return _row_losses(head(hidden_KD), targets_K)


def _in_parts(head: nn.Module, work: Callable[[Tensor, Tensor], Tensor], *rows: Tensor) -> Tensor:
    """The concatenated results of `work` over a few tokens at a time."""
    size = part_size(head)
    return torch.cat([work(*parts) for parts in zip(*(r.split(size) for r in rows), strict=True)])


def part_size(head: nn.Module) -> int:
    """Tokens whose logits are in memory at once."""
    weight_VD = head._parameters["weight"]
    assert weight_VD is not None
    device = weight_VD.device
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return tokens_at_once(shape_of(weight_VD)[0], memory)


def tokens_at_once(vocabulary: int, gpu_memory: float | None) -> int:
    """Tokens whose logits are in memory at once.

    Args:
        gpu_memory: bytes of the GPU's memory; None on a CPU
    """
    entries = ENTRIES if gpu_memory is None else max(ENTRIES, int(gpu_memory) // (GPU_SHARE * LOGIT_BYTES))
    return max(1, entries // vocabulary)


class _FrozenHead(torch.autograd.Function):
    """Losses [K] by a frozen head; the gradients of the hidden states are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_KD: Tensor, targets_K: Tensor, head: nn.Module) -> Tensor:
        losses, gradients = [], []
        size = part_size(head)
        for hidden_nD, targets_n in zip(hidden_KD.split(size), targets_K.split(size), strict=True):
            part = hidden_nD.detach().requires_grad_()
            with torch.enable_grad():
                loss = _losses(head, part, targets_n)
                (gradient,) = torch.autograd.grad(loss.sum(), part)
            losses.append(loss.detach())
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, upstream_K: Tensor) -> tuple[Tensor, None, None]:
        (gradient_KD,) = ctx.saved_tensors
        return gradient_KD * upstream_K.unsqueeze(1).to(gradient_KD.dtype), None, None
