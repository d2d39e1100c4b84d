"""A task's metrics of a model, on one rank or shared among several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from irdscale.distributed.ranks import all_reduce_sum, failing_together
from irdscale.distributed.watchdog import watched
from irdscale.distributed.zero3 import device_of, gathering, to_gpu
from irdscale.fisher.capture import frozen
from irdscale.models.batches import LateRows, shared_batches
from irdscale.models.checks import padding_known_to_matter, warn_once
from irdscale.tasks.outputs import Outputs
from irdscale.training.evaluate_language import evaluate_language

if TYPE_CHECKING:
    from datasets import Dataset

    from irdscale.tasks import Task


def evaluate_model(model: nn.Module, task: Task, split: Dataset, batch_size: int) -> dict[str, float]:
    """Every metric of the task on a split. Collective: ranks share the samples, and all get the metrics.

    Raises:
        TrainingError: a logit, or the loss of a text, is NaN or infinite.
    """
    return _evaluated(model, task, split, batch_size, errors=False)[0]


def evaluate_with_errors(
    model: nn.Module, task: Task, split: Dataset, batch_size: int, outputs: Outputs | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """`evaluate_model`, and the standard error of each metric over draws of the split's samples.

    Args:
        outputs: gets what the metrics are computed from.

    Raises:
        TrainingError: as `evaluate_model`.
    """
    return _evaluated(model, task, split, batch_size, errors=True, outputs=outputs)


def _evaluated(
    model: nn.Module, task: Task, split: Dataset, batch_size: int, errors: bool, outputs: Outputs | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    to_gpu(model)
    with watched():
        if task.is_language:
            return evaluate_language(model, task, split, batch_size, outputs)
        logits_NC = sample_logits(model, task, split, batch_size)
        if outputs is not None:
            outputs.logits = logits_NC
        logits = logits_NC.numpy()
        with failing_together():
            labels = np.asarray(split.with_format("numpy")["labels"])
            return task.compute_metrics(logits, labels), task.standard_errors(logits, labels) if errors else {}


def sample_logits(model: nn.Module, task: Task, split: Dataset, batch_size: int) -> Tensor:
    """Logits [N, C] of every sample, as float64, on every rank. Collective."""
    lengths = [len(ids) for ids in split["input_ids"]]
    device, logits_NC = device_of(model), torch.zeros(len(lengths), task.num_labels, dtype=torch.float64)
    found = LateRows(logits_NC)

    def predict(places: list[int]) -> None:
        samples = [split[i] for i in places or [0]]
        inputs = {k: v.to(device, non_blocking=True) for k, v in task.collate(samples).items() if k != "labels"}
        found_BC = model(**inputs).logits
        if places:
            found.add(places, found_BC.view(len(places), -1))

    with gathering(model), frozen(model), torch.no_grad():
        equal = batch_size > 1 and padding_known_to_matter(model, task.collate, split)
        if equal:
            warn_once(
                f"train.eval_batch_size: {type(model).__name__}'s output for a sample depends on how far its batch is "
                f"padded; batches hold samples of equal length"
            )
        shared_batches(model, lengths, batch_size, predict, equal=equal)
        found.read()
    all_reduce_sum([logits_NC])
    return logits_NC
