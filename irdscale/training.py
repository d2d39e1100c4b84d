"""Sparse fine-tuning of one candidate with the Hugging Face Trainer, and its metrics."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from irdscale.config import RunConfig, TrainConfig
from irdscale.errors import InputError, RunError
from irdscale.mask import Mask
from irdscale.sparse import entries_of, matching_parameters, sparsify
from irdscale.tasks import build_model

if TYPE_CHECKING:
    from datasets import Dataset

    from irdscale.tasks import Task


def trained_whole(config: RunConfig, model: nn.Module, new: list[str]) -> list[str]:
    """Names of the parameters that are trained outside the mask.

    Args:
        new: the ones that the checkpoint does not hold, which `train.always_train: auto` stands for.

    Raises:
        InputError: an expression of `train.always_train` matches no parameter.
    """
    if config.train.always_train == "auto":
        return new
    return matching_parameters(dict(model.named_parameters()), config.train.always_train)


def training_steps(config: TrainConfig, samples: int) -> int:
    """Optimizer steps of one candidate; one epoch unless `steps` or `epochs` say otherwise."""
    if config.steps is not None:
        return config.steps
    return math.ceil((config.epochs or 1.0) * math.ceil(samples / config.batch_size))


def sparse_model(config: RunConfig, task: Task, mask: Mask | None, seed: int) -> nn.Module:
    """The task's model with the mask's entries trainable (none for no mask), and its head, initialised by `seed`.

    Raises:
        InputError: the mask does not fit the model, or there is nothing to train.
    """
    model, new = build_model(config, task, seed)
    whole = trained_whole(config, model, new)
    mask = mask if mask is not None else Mask({}, {})
    if mask.k == 0 and not whole:
        raise InputError("train.always_train: found no parameter and an empty mask; expected something to train")
    return sparsify(model, mask, always_train=[f"^{re.escape(name)}$" for name in whole])


def fine_tune(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    seed: int,
    advance: Callable[..., None] | None = None,
) -> None:
    """Train a sparse model in place on the train split: AdamW on the masked entries and the head.

    At equal seed the data order and the dropout stream are equal, whatever the mask. Weight decay leaves biases and
    norms alone, as in the Trainer.

    Raises:
        RunError: the loss is NaN or infinite; names the step and the learning rate.
    """
    callback = _Callback(seed, advance)
    with tempfile.TemporaryDirectory() as scratch:
        steps = training_steps(config, len(task.train))
        arguments = _arguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            lr_scheduler_type=config.schedule,
            warmup_steps=round(config.warmup_ratio * steps),
            max_grad_norm=config.max_grad_norm,
            optim="adamw_torch",
            seed=seed,
            data_seed=seed,
        )
        trainer = _SparseTrainer(
            model=model,
            args=arguments,
            train_dataset=task.train,
            data_collator=task.collate,
            callbacks=[callback],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.decay = config.decay
        trainer.train()
    model.eval()


def _arguments(**chosen: Any) -> TrainingArguments:
    """Training arguments that write and print nothing, for one device."""
    arguments = TrainingArguments(
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        **chosen,
    )
    # The Trainer would copy the model to every GPU it sees (DataParallel), and the copies would not train.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class _Callback(TrainerCallback):
    def __init__(self, seed: int, advance: Callable[..., None] | None) -> None:
        self._seed, self._advance = seed, advance

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        # Nothing that came before, such as the size of a mask, may shift the dropout stream.
        torch.manual_seed(self._seed)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._advance is not None:
            self._advance()


class _SparseTrainer(Trainer):
    """Stops at a loss that is no number, and decays weights rather than deltas where that is asked for."""

    decay = "delta"

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else 0.0
            raise RunError(f"the loss is {loss.item()} at step {self.state.global_step + 1}, learning rate {rate:.3g}")
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.decay == "weight" and self.args.weight_decay:
            decay_towards_zero(optimizer, cast(nn.Module, self.model))
        return optimizer


def decay_towards_zero(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Make decoupled decay of the deltas v into decay of the weights b + v.

    AdamW gives v' = (1 - lr wd) v - update; after each step lr wd b is subtracted too.
    """
    bases = {id(entries.values): entries for entries in entries_of(model).values()}

    def after_step(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for group in stepped.param_groups:
            shrink = group["lr"] * group["weight_decay"]
            for values in group["params"]:
                if shrink and id(values) in bases and values.grad is not None:
                    values.data.sub_(bases[id(values)].base.to(values.dtype), alpha=shrink)

    optimizer.register_step_post_hook(after_step)


def evaluate_model(model: nn.Module, task: Task, split: Dataset, batch_size: int) -> dict[str, float]:
    """Every metric of the task on a split.

    Raises:
        RunError: a logit is NaN or infinite.
    """
    lengths = [len(ids) for ids in split["input_ids"]]
    # Batches of like lengths waste no time on padding; metrics do not see the order.
    ordered = split.select(sorted(range(len(lengths)), key=lengths.__getitem__))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = _arguments(output_dir=scratch, per_device_eval_batch_size=batch_size)
        trainer = Trainer(model=model, args=arguments, data_collator=task.collate)
        trainer.remove_callback(PrinterCallback)
        predicted = trainer.predict(ordered)
    logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    return task.compute_metrics(np.asarray(logits), np.asarray(predicted.label_ids))


def adapter_config(config: RunConfig, seed: int) -> dict[str, Any]:
    """What an adapter's folder says about how it was made."""
    sections = config.model_dump(mode="json", include={"model", "task", "train"})
    return {**sections, "seed": seed}
