"""A task's metrics of a model, on one rank or shared among several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from irdscale.fisher.capture import frozen
from irdscale.language_evaluation import evaluate_language
from irdscale.partitioned import device_of, gathering, is_partitioned, to_gpu
from irdscale.progress import bar
from irdscale.ranks import add_up, failing_together, rank_and_world
from irdscale.watch import watched

if TYPE_CHECKING:
    from datasets import Dataset

    from irdscale.tasks import Task


def evaluate_model(model: nn.Module, task: Task, split: Dataset, batch_size: int) -> dict[str, float]:
    """Every metric of the task on a split. Collective: ranks share the samples, and all get the metrics.

    Raises:
        TrainingError: a logit, or the loss of a text, is NaN or infinite.
    """
    to_gpu(model)
    with watched():
        if task.is_language:
            return evaluate_language(model, task, split, batch_size)
        logits = _logits(model, task, split, batch_size)
        with failing_together():
            labels = np.asarray(split.with_format("numpy")["labels"])
            return task.compute_metrics(logits.numpy(), labels)


def _logits(model: nn.Module, task: Task, split: Dataset, batch_size: int) -> Tensor:
    """Logits [N, C] of every sample, as float64, on every rank."""
    rank, world = rank_and_world()
    lengths = [len(ids) for ids in split["input_ids"]]
    # Batches of like lengths waste no time on padding.
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    own = batches[rank::world]
    if is_partitioned(model) and len(own) * world < len(batches) + world - 1:
        # A rank with nothing left gathers with the others, and counts for nothing.
        own += [[]] * (-(-len(batches) // world) - len(own))
    device, logits_NC = device_of(model), torch.zeros(len(order), task.num_labels, dtype=torch.float64)
    # No bar of its own, but who listens from outside hears that it goes on.
    with bar("Evaluating", len(own), enabled=False) as advance, gathering(model), frozen(model), torch.no_grad():
        for places in own:
            advance()
            samples = [split[i] for i in places or batches[0][:1]]
            inputs = {k: v.to(device) for k, v in task.collate(samples).items() if k != "labels"}
            found_BC = model(**inputs).logits
            if places:
                logits_NC[places] = found_BC.double().cpu().view(len(places), -1)
    add_up([logits_NC])
    return logits_NC
