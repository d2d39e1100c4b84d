"""The training loss of a language model: the mean over target tokens, computed without all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from irdscale.distributed.ranks import largest_of, rank_and_world
from irdscale.distributed.zero3 import gathering, to_gpu
from irdscale.fisher.capture import frozen
from irdscale.fisher.losses import sample_losses
from irdscale.models.checks import loss_differs, require_causal, warn_once
from irdscale.models.chunked_losses import PLACES, finishing, found_losses, headless, next_tokens, target_places

if TYPE_CHECKING:
    from irdscale.tasks import Task


def text_loss(model: nn.Module, task: Task) -> tuple[AbstractContextManager[None], Callable[..., Any], bool]:
    """Prepare a language model's training.

    Returns:
        A context in which the model returns the mean loss of a batch's target tokens; the batches' collate function;
        and whether the model's own loss is another one, which is then trained on. The batches carry the places of
        their targets, counted before they are copied to the device.
    """
    to_gpu(model)
    first = task.collate([task.train[0]])
    with gathering(model), frozen(model):
        require_causal(model, first)
        (own_loss,) = largest_of([loss_differs(model, first, _mean_loss)])
        parts = None if own_loss else headless(model, first)
    if own_loss and rank_and_world()[0] == 0:
        warn_once(
            f"training takes the own loss of {type(model).__name__}, which is not the mean of its target tokens' "
            f"(token weights, auxiliary losses)"
        )
    if parts is None:
        return nullcontext(), task.collate, bool(own_loss)

    def finish(
        hidden_BTD: Tensor, labels: Tensor, target_places: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> CausalLMOutput:
        targets_BT = next_tokens(labels)
        count = len(target_places) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=found_losses(parts.head, hidden_BTD, targets_BT, target_places).sum() / count)

    def collate(samples: list[Any]) -> dict[str, Any]:
        batch = task.collate(samples)
        return {**batch, PLACES: target_places(batch["labels"])}

    return finishing(model, parts, finish), collate, False


def _mean_loss(logits_1TV: Tensor, labels_1T: Tensor) -> Tensor:
    return sample_losses("causal-lm", logits_1TV, labels_1T)
