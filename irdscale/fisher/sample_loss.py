"""Each sample's loss: the model's own, or that of its logits, or that of its hidden states and its head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.distributed.ranks import failing_together, rank_and_world
from irdscale.distributed.zero3 import device_of
from irdscale.errors import InputError
from irdscale.fisher.capture import frozen
from irdscale.fisher.losses import Objective, TokenReduction, loss_kind, objective_losses, reduced, sample_losses
from irdscale.models.batches import Collate, SizedDataset, batch_size, has_token_labels, moved
from irdscale.models.checks import CLASSES, loss_differs
from irdscale.models.chunked_losses import (
    PLACES,
    Headless,
    beginning,
    drawn_tokens,
    finishing,
    found_losses,
    headless,
    next_tokens,
    target_places,
)

log = logging.getLogger(__name__)


@dataclass
class SampleLoss:
    """The losses of a data set's samples by one model.

    Attributes:
        partitioned: whether the model is in ZeRO-3 partitions
        has_own: whether the model's own loss differs from that of its logits; objective `label` then takes its own
        headless: parts of a language model whose head runs over a few tokens at a time
        passes: backward passes of one batch
    """

    model: nn.Module
    dataset: SizedDataset
    collate_fn: Collate
    objective: Objective
    token_reduction: TokenReduction
    seed: int
    partitioned: bool
    has_own: bool = False
    headless: Headless | None = None
    passes: int = 1

    @property
    def uses_own(self) -> bool:
        """Whether the model's own `.loss` is taken, one sample at a time since it may be no mean over samples."""
        return self.has_own and self.objective == "label"

    def collated(self, indices: Sequence[int]) -> dict[str, Any]:
        """The samples in one batch.

        Raises:
            InputError: they have no labels, and the objective needs them.
        """
        batch = self.collate_fn([self.dataset[i] for i in indices])
        if "labels" not in batch and self.objective == "label":
            raise InputError("found no labels", "labels for fisher.objective 'label'", where=f"sample {indices[0]}")
        return batch

    def small_batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The samples in one batch on the model's device, texts cut short so that the logits of all tokens fit."""
        batch = moved(self.collated(indices), device_of(self.model))
        return beginning(batch) if has_token_labels(batch) else batch

    def is_causal(self, batch: dict[str, Any]) -> bool:
        """Whether the batch is one of texts for a causal language model."""
        return has_token_labels(batch) and (
            loss_kind(self.model, batch["input_ids"].unsqueeze(2), batch["labels"]) == "causal-lm"
        )

    def differs(self, first: int) -> bool:
        """Whether the model's own loss of one sample differs from ours, for the data's labels or for any class."""
        count = len(self.dataset)
        for place, index in enumerate(dict.fromkeys([first, count // 3, 2 * count // 3, count - 1])):
            batch = self.collated([index])
            if not isinstance(batch.get("labels"), Tensor):
                return False
            for labels in [batch["labels"], *(() if place else _classes_to_try(self.model, batch["labels"]))]:
                tried = {**batch, "labels": labels}
                if all(loss_differs(self.model, tried, partial(self._ours, r)) for r in {"mean", self.token_reduction}):
                    return True
        return False

    def _ours(self, reduction: TokenReduction, logits: Tensor, labels: Tensor) -> Tensor:
        return sample_losses(loss_kind(self.model, logits, labels), logits, labels, reduction)

    def why_own(self) -> str | None:
        """Why the model's own loss is taken; None if it is not.

        Raises:
            InputError: `token_reduction` is `sum`, and the model's own loss is a mean.
        """
        name = type(self.model).__name__
        if not self.uses_own:
            if self.has_own and rank_and_world()[0] == 0:
                log.warning(
                    "fisher.objective: '%s' takes the likelihood of the logits of %s, without the other parts of its "
                    "own loss",
                    self.objective,
                    name,
                )
            return None
        if self.token_reduction == "sum":
            expected = f"'mean' for {name}, whose own loss is not that of its logits"
            raise InputError("found 'sum'", expected, key="fisher.token_reduction")
        return (
            f"the own loss of {name}, which is used, is not the negative log-likelihood of its logits (class weights, "
            f"auxiliary losses)"
        )

    def choose(self, batch: dict[str, Any], scored: dict[str, nn.Parameter]) -> None:
        """Set `headless` and `passes` by forward passes over a small batch."""
        with frozen(self.model), torch.no_grad():
            if self.is_causal(batch) and not self.has_own:
                parts = headless(self.model, batch)
                own = {id(p) for p in scored.values()}
                # The rules need the gradients of all tokens of a scored head together.
                if parts is not None and not any(id(p) in own for p in parts.head.parameters()):
                    self.headless = parts
            if self.objective == "expected":
                logits = _logits(self.model(**_inputs(batch)))
                self.passes = logits.reshape(batch_size(batch), -1).shape[1]

    def agreeing(self) -> AbstractContextManager[None]:
        """Ranks of a partitioned model fail together inside, before they gather parameters together."""
        return failing_together() if self.partitioned else nullcontext()

    def of(self, indices: Sequence[int], forward: Callable[[dict[str, Any]], Any]) -> list[Tensor]:
        """The losses [B] of one forward pass, one tensor for each backward pass of the objective."""
        with self.agreeing():
            batch = self.collated(indices)
            if self.headless is not None:
                # Targets are counted before the batch is moved, since counting waits for the device.
                batch = {**batch, PLACES: target_places(batch["labels"])}
            batch = moved(batch, device_of(self.model))
        if self.uses_own:
            assert len(indices) == 1
            return [forward(batch).loss.reshape(1)]
        if self.headless is not None:
            with finishing(self.model, self.headless, partial(self._text_losses, self.headless, batch, indices)):
                return [forward(_inputs(batch))]
        logits, labels = _logits(forward(_inputs(batch))), batch.get("labels")
        with self.agreeing():
            kind = loss_kind(self.model, logits, logits.new_zeros(len(logits)) if labels is None else labels)
            reduction = self.token_reduction
            return list(objective_losses(self.objective, kind, logits, labels, indices, self.seed, reduction))

    def _text_losses(
        self, parts: Headless, batch: dict[str, Any], indices: Sequence[int], hidden_BTD: Tensor
    ) -> Tensor:
        labels = batch["labels"]
        if self.objective == "sampled":
            labels = drawn_tokens(parts.head, hidden_BTD, labels, indices, self.seed)
        losses_BT = found_losses(parts.head, hidden_BTD, next_tokens(labels), batch[PLACES])
        return reduced(losses_BT, labels, self.token_reduction)

    def check_finite(self, indices: Sequence[int], losses_N: Tensor) -> None:
        """Refuse losses that are NaN or infinite.

        Raises:
            InputError: names the sample.
        """
        bad = (~losses_N.isfinite()).nonzero().flatten().tolist()
        if bad:
            row = self.dataset[indices[bad[0]]]
            row = f" (row {row['row']} of its split)" if isinstance(row, dict) and "row" in row else ""
            raise InputError(
                f"found a loss of {losses_N[bad[0]].item()}", "a finite number", where=f"sample {indices[bad[0]]}{row}"
            )


def _classes_to_try(model: nn.Module, labels: Tensor) -> list[Tensor]:
    """For a classifier, some other labels of a sample, since its loss may weigh classes differently."""
    classes = getattr(getattr(model, "config", None), "num_labels", 1)
    if labels.dim() != 1 or labels.is_floating_point() or classes == 1:
        return []
    count = min(classes, CLASSES)
    return [torch.full_like(labels, classes * i // count) for i in range(count)]


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in ("labels", PLACES)}


def _logits(output: Any) -> Tensor:
    logits = output.logits if hasattr(output, "logits") else output
    if not isinstance(logits, Tensor):
        raise InputError(f"found an output of class {type(output).__name__}", "one with logits", where="the model")
    return logits
