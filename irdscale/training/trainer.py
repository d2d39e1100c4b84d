"""Sparse fine-tuning of one candidate with the Hugging Face Trainer, on one rank or many, with or without DeepSpeed.

Features: AdamW on the masked entries and the head; data-parallel ranks (DDP), or DeepSpeed ZeRO 0-3 by the user's JSON;
gradient accumulation and checkpointing; gradient clipping; both meanings of weight decay; a saved state from which a
killed training continues, also on another number of ranks or with another ZeRO stage.

Constraints: `train.batch_size` counts the samples of a step on all ranks, and must divide among them. The seed alone
fixes the order of the samples, so the batches are the same for any number of ranks.
"""

from __future__ import annotations

import random
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PrinterCallback

from irdscale.config.schema import HOW_TO_TRAIN, RunConfig, TrainConfig, result_settings, training_steps
from irdscale.distributed.deepspeed import forget_settings, micro_batch, zero_settings
from irdscale.distributed.ranks import failing_together, largest_of, rank_and_world, same_on_every_rank
from irdscale.distributed.watchdog import watched
from irdscale.distributed.zero3 import gathering, release_engine, to_gpu
from irdscale.fisher.capture import frozen
from irdscale.models.checks import padding_known_to_matter, unheard, warn_once
from irdscale.sparse import sparse_state, trained_on
from irdscale.training.callback import TrainingCallback
from irdscale.training.checkpoint import load_training, saved_best, saved_losses, saved_step
from irdscale.training.control import Control
from irdscale.training.evaluations import Evaluations
from irdscale.training.hf_trainer import SparseTrainer, Training, training_arguments
from irdscale.training.loss_trend import loss_trend
from irdscale.training.recorder import Recorder, Records
from irdscale.training.text_loss import text_loss
from irdscale.utils.files import digest
from irdscale.utils.interrupts import deferred

if TYPE_CHECKING:
    from irdscale.tasks import Task


def training_order(samples: int, count: int, seed: int) -> list[int]:
    """Indices of the `count` samples that are trained on, in order: shuffles of the split, one after another.

    A batch may extend into the next shuffle, so all batches have one size.
    """
    generator = random.Random(f"training/{seed}")
    order: list[int] = []
    while len(order) < count:
        order += generator.sample(range(samples), samples)
    return order[:count]


def fine_tune(
    model: nn.Module,
    task: Task,
    config: RunConfig,
    seed: int,
    control: Control | None = None,
    state: Path | None = None,
    records: Records | None = None,
) -> dict[str, Any] | None:
    """Train a sparse model in place on the train split. Collective where torch.distributed is initialised.

    At equal seed the batches are equal, whatever the mask and the number of ranks; each rank has its own dropout
    stream. Weight decay leaves biases and norms alone, as in the Trainer. With `train.keep: best` the model ends with
    the numbers of the best evaluation.

    Args:
        state: folder of the training's saved state, which all ranks share; a state of this training is continued.
        records: where the metrics of its steps go, besides `control`.

    Returns:
        The loss at the beginning and at the end, steps of an earlier run included; see
        `irdscale.training.loss_trend.loss_trend`.

    Raises:
        InputError: `train.batch_size` does not divide among the ranks, or `train.deepspeed` cannot be used.
        TrainingError: a loss is NaN or infinite; names the step and the learning rate.
        RunError: a rank died (named), or the state cannot be written.
        Paused: `control` requested it, and the `state` is saved.
        KeyboardInterrupt: a rank received a signal; with a `state`, that is saved first.
    """
    control, world = control or Control(), rank_and_world()[1]
    train, steps = config.train, training_steps(config.train, len(task.trained))
    settings, micro = zero_settings(config, world), micro_batch(config, world)
    made_by = {"train": _settings(train), "seed": seed, **trained_on(model)}
    same_on_every_rank({"training": digest(made_by)})
    with failing_together():
        done = 0 if state is None else saved_step(state, made_by)
    (done,) = largest_of([done])
    (control.resumed or control.advance)(done)
    losses = saved_losses(state) if state is not None and done else []
    _make_absolute(model, train.decay == "weight" and train.weight_decay > 0)
    evaluations = Evaluations(model, task, train, steps)
    if state is not None and done and train.keep == "best":
        evaluations.best = saved_best(state, model)
    if done < steps:
        name = None if records is None else records.name
        training = Training(train, seed, steps, done, control, state, made_by, losses, name)
        callback = TrainingCallback(training, evaluations, Recorder(records, train, task, done))
        losses = _train(model, task, callback, settings, micro)
    elif state is not None:
        load_training(state, model)
    kept = evaluations.keep()
    if train.keep == "best":
        control.kept(kept)
    _make_absolute(model, False)
    model.eval()
    return loss_trend(losses)


def _settings(train: TrainConfig) -> dict[str, Any]:
    """The keys of `train` on which the numbers of a training depend."""
    found = result_settings(train.model_dump(mode="json"))
    return {key: value for key, value in found.items() if key not in (*HOW_TO_TRAIN, "adapter_dtype")}


def _make_absolute(model: nn.Module, absolute: bool) -> None:
    for entries in sparse_state(model).entries.values():
        entries.make_absolute(absolute)


def _train(
    model: nn.Module, task: Task, callback: TrainingCallback, settings: dict[str, Any] | None, micro: int
) -> list[float]:
    """Make the steps that are left; returns the loss of each step."""
    training = callback.training
    batch = training.train.batch_size
    order = training_order(len(task.trained), training.steps * batch, training.seed)[training.done * batch :]
    losing: AbstractContextManager[None] = nullcontext()
    collate, own_loss = task.collate, False
    if task.is_language:
        losing, collate, own_loss = text_loss(model, task)
    elif batch > 1:
        _warn_if_padding_matters(model, task)
    if training.train.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
    with tempfile.TemporaryDirectory() as scratch, watched():
        trainer = callback.trainer = SparseTrainer(
            training,
            model=model,
            args=training_arguments(training, scratch, settings, micro),
            train_dataset=task.trained.select(order),
            data_collator=collate,
            callbacks=[callback],
        )
        trainer.remove_callback(PrinterCallback)
        # The Trainer then divides by the tokens of all ranks and passes. A model's own loss is averaged over passes,
        # because its other terms do not add up over them.
        trainer.model_accepts_loss_kwargs = task.is_language and not own_loss
        try:
            with losing, nullcontext() if training.state is None else deferred():
                trainer.train()
            release_engine(trainer.model_wrapped)
            losses = callback.losses()
        finally:
            callback.recorder.end()
            forget_settings()
    if training.train.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_disable()
    return losses


def _warn_if_padding_matters(model: nn.Module, task: Task) -> None:
    to_gpu(model)
    with gathering(model), frozen(model), unheard(model):
        matters = padding_known_to_matter(model, task.collate, task.trained)
    if matters and rank_and_world()[0] == 0:
        warn_once(
            f"train.batch_size: {type(model).__name__}'s output for a sample depends on how far its batch is padded; "
            f"metrics depend on the batch size"
        )


def adapter_dtype(config: RunConfig) -> torch.dtype | None:
    """The data type of an adapter's stored deltas; None for the type in which they were trained."""
    return torch.bfloat16 if config.train.adapter_dtype == "bfloat16" else None


def adapter_config(config: RunConfig, task: Task, seed: int) -> dict[str, Any]:
    """How an adapter was made, for its adapter.json; `counted`: its classes in the order of the metrics."""
    sections = config.model_dump(mode="json", include={"model", "task", "train"})
    counted = {} if task.class_order is None else {"counted": [task.label_names[place] for place in task.class_order]}
    return {**sections, "seed": seed, **counted}
