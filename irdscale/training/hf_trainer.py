"""The Hugging Face Trainer of a sparse model: its arguments, and what differs from the stock Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler

from irdscale.config.schema import TrainConfig
from irdscale.distributed.deepspeed import compile_nothing
from irdscale.distributed.ranks import current_group
from irdscale.sparse import dense_beside_mask
from irdscale.training.control import Control
from irdscale.training.step_metrics import StepLosses


@dataclass(frozen=True)
class Training:
    """One training, of which an earlier run may have made some steps.

    Attributes:
        train: the section `train` of the configuration.
        seed: seed of the random streams.
        steps: optimizer steps of the training.
        done: steps that an earlier run made.
        state: folder of the saved state; None to save none.
        made_by: inputs of the training, by name; a state made by other inputs is not continued.
        losses: loss of each step that an earlier run made.
        name: name of the run for trackers; None for a training that is not recorded.
    """

    train: TrainConfig
    seed: int
    steps: int
    done: int
    control: Control
    state: Path | None
    made_by: dict[str, Any]
    losses: list[float]
    name: str | None = None


class SparseTrainer(Trainer):
    """Trains on the samples in their given order, records losses, and starts at step `training.done`."""

    def __init__(self, training: Training, **kwargs: Any) -> None:
        self.training, self.losses = training, StepLosses()
        super().__init__(**kwargs)

    @property
    def step(self) -> int:
        """Steps made, those of an earlier run included."""
        return self.training.done + self.state.global_step

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(cast(Any, train_dataset or self.train_dataset))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        # Only a record of the steps has the rate of tokens.
        mask = None if self.training.name is None else inputs.get("attention_mask")
        loss = super().training_step(model, inputs, *args, **kwargs)
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else 0.0
        self.losses.add(self.step + 1, loss, float(rate), mask)
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the count is not used, and counting walks over all parameters in each pass."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm, left on the device, because reading it waits for the device. DeepSpeed has none at stage 0."""
        if grad_norm is not None:
            self.losses.add_norm(self.step + 1, grad_norm)
        return grad_norm

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """AdamW; parameters trained densely beside a mask have at most the learning rate `train.max_head_rate`."""
        made, train = self.optimizer is None, self.training.train
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and train.max_head_rate is not None and train.max_head_rate < train.learning_rate:
            _limit_rate(optimizer, dense_beside_mask(cast(nn.Module, self.model)), train.max_head_rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate schedule of all `training.steps`, starting at step `training.done`."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            train, steps, done = self.training.train, self.training.steps, self.training.done
            shape = torch.optim.SGD([torch.zeros(1)], lr=1.0)
            (factor,) = get_scheduler(train.schedule, shape, round(train.warmup_ratio * steps), steps).lr_lambdas
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(done + step))
            self._created_lr_scheduler = True
        return self.lr_scheduler


def _limit_rate(optimizer: Any, parameters: Sequence[nn.Parameter], rate: float) -> None:
    """Move parameters into groups of their own, with this learning rate; groups keep their order, the new ones last."""
    moved, groups = {id(parameter) for parameter in parameters}, optimizer.param_groups
    kept = [{**group, "params": [p for p in group["params"] if id(p) not in moved]} for group in groups]
    limited = [{**group, "params": [p for p in group["params"] if id(p) in moved], "lr": rate} for group in groups]
    optimizer.param_groups[:] = [group for group in kept + limited if group["params"]]


def training_arguments(
    training: Training, scratch: str, settings: dict[str, Any] | None, micro: int
) -> TrainingArguments:
    """Arguments of a Trainer that writes and prints nothing, with one device per rank.

    Args:
        settings: DeepSpeed's settings; None to train without it.
        micro: samples of one forward pass on one rank.
    """
    if settings is not None:
        compile_nothing()
    gpu, train = torch.cuda.is_available(), training.train
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=training.steps - training.done,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",
        seed=training.seed,
        data_seed=training.seed,
        deepspeed=settings,
        use_cpu=not gpu,
        ddp_backend="gloo" if current_group() is not None and not gpu else None,
        ddp_find_unused_parameters=False,
        save_strategy="no",
        logging_strategy="no",
        # The filter waits for the device in each pass; `StepLosses` checks all losses.
        logging_nan_inf_filter=False,
        # `irdscale.training.trackers` calls the trackers.
        report_to=[],
        run_name=training.name,
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        # A blocking copy of a batch waits for all earlier work of the device.
        accelerator_config={"non_blocking": gpu},
        label_names=["labels"],
        # The task's collate function takes the columns that it needs.
        remove_unused_columns=False,
    )
    # The Trainer would copy the model to every visible GPU (DataParallel), and the copies would not train.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
