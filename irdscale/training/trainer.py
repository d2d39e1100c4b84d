"""Sparse fine-tuning of one candidate with the Hugging Face Trainer, on one rank or many, with DeepSpeed or without.

Features: AdamW on the masked entries and the head; data-parallel ranks (DDP), or DeepSpeed ZeRO 0-3 by the user's JSON;
gradient accumulation and checkpointing; clipping over the trained numbers; both meanings of weight decay; a state on
disk from which a killed training goes on, on other ranks and another ZeRO stage too.

Constraints: the batch size is that of a step, whatever the number of ranks, and must divide among them. Samples come
in an order that the seed alone fixes, so all numbers of ranks see the same batches.
"""

from __future__ import annotations

import math
import random
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput
from transformers.optimization import get_scheduler

from irdscale.config.schema import HOW_TO_TRAIN, RunConfig, TrainConfig, training_steps
from irdscale.distributed.deepspeed import forget_settings, micro_batch, zero_settings
from irdscale.distributed.ranks import (
    all_reduce_sum,
    current_group,
    failing_together,
    gather_texts,
    largest_of,
    rank_and_world,
    same_on_every_rank,
)
from irdscale.distributed.watchdog import watched
from irdscale.distributed.zero3 import gathering, release_engine, to_gpu
from irdscale.errors import InputError, TrainingError
from irdscale.fisher.capture import frozen
from irdscale.fisher.losses import sample_losses
from irdscale.masks.mask import Mask
from irdscale.models.build import build_model
from irdscale.models.checks import loss_differs, padding_known_to_matter, require_causal, unheard, warn_once
from irdscale.models.chunked_losses import PLACES, finishing, found_losses, headless, next_tokens, target_places
from irdscale.models.lora import insert_lora
from irdscale.sparse import matching_parameters, sparse_state, sparsify, trained_on
from irdscale.training.checkpoint import (
    digest_seed,
    load_generators,
    load_training,
    load_values,
    save_training,
    saved_losses,
    saved_step,
)
from irdscale.training.loss_trend import loss_trend
from irdscale.utils.files import digest
from irdscale.utils.interrupts import deferred, wanted

if TYPE_CHECKING:
    from irdscale.tasks import Task


# Losses are read, and ranks agree on what goes on, about so often; slow steps each.
LOOK_S = 1.0
# A training's last state is saved too where the steps since the one before took so long.
WORTH_S = 30.0


class Paused(Exception):  # noqa: N818 - nothing went wrong
    """A training was asked to pause; its state is saved, and the same call goes on from there."""


@dataclass(frozen=True)
class Control:
    """What somebody outside has to do with a training while it runs.

    Attributes:
        advance: called on each rank with the number of steps just made.
        resumed: called first, with the number of steps that an earlier run made; `advance` unless given.
        pausing: asked on rank 0 before each step is made, of several ranks about once a second; true saves the state
            and ends with `Paused`.
        rungs: steps after which every rank calls `at_rung`; not the last one.
        at_rung: takes how many steps are made; collective.
        seen: takes how many steps were made, the loss of this rank's last pass, and the learning rate; called for each
            step in turn, when the losses of several are read.
    """

    advance: Callable[..., None] = lambda n=1: None
    pausing: Callable[[], bool] = lambda: False
    rungs: frozenset[int] = frozenset()
    at_rung: Callable[[int], None] = lambda step: None
    seen: Callable[[int, float, float], None] | None = None
    resumed: Callable[[int], None] | None = None


def trained_densely(config: RunConfig, model: nn.Module, new: list[str]) -> list[str]:
    """Names of the parameters that are trained outside the mask.

    Args:
        new: the ones that the checkpoint does not hold, which `train.always_train: auto` stands for.

    Raises:
        InputError: an expression of `train.always_train` matches no parameter.
    """
    if config.train.always_train == "auto":
        return new
    return matching_parameters(dict(model.named_parameters()), config.train.always_train)


def training_order(samples: int, count: int, seed: int) -> list[int]:
    """Places of `count` samples in the order in which they are trained on: shuffles of the split, one after another.

    A batch may reach over the end of a shuffle, so that all batches are of one size.
    """
    generator = random.Random(f"training/{seed}")
    order: list[int] = []
    while len(order) < count:
        order += generator.sample(range(samples), samples)
    return order[:count]


def put_lora(config: RunConfig, model: nn.Module, new: list[str], seed: int, rank: int | None) -> list[str]:
    """Put LoRA matrices of this rank into a model's linear layers (none for None), in place, initialised by `seed`.

    Args:
        new: names of the parameters that the checkpoint does not hold.

    Returns:
        The names of the parameters that are trained outside a mask: these matrices and the head.

    Raises:
        InputError: as `trained_densely` and `irdscale.models.lora.insert_lora`.
    """
    dense = trained_densely(config, model, new)
    return dense if rank is None else [*dense, *insert_lora(model, rank, seed, dense)]


def sparse_model(
    config: RunConfig, task: Task, mask: Mask | None, seed: int, lora_rank: int | None = None
) -> nn.Module:
    """The task's model with the mask's entries trainable (none for no mask), and its head, initialised by `seed`.

    Args:
        lora_rank: of LoRA matrices to train, in place of a mask.

    Raises:
        InputError: the mask does not fit the model, or there is nothing to train.
    """
    model, new = build_model(config, task, seed)
    return make_sparse(config, model, new, mask, seed, lora_rank)


def make_sparse(
    config: RunConfig, model: nn.Module, new: list[str], mask: Mask | None, seed: int, lora_rank: int | None = None
) -> nn.Module:
    """`sparse_model` of a model that is built already, in place.

    Args:
        new: names of the parameters that the checkpoint does not hold.

    Raises:
        InputError: as `sparse_model`.
    """
    dense = put_lora(config, model, new, seed, lora_rank)
    mask = mask if mask is not None else Mask({}, {})
    if mask.k == 0 and not dense:
        raise InputError("train.always_train: found no parameter and an empty mask; expected something to train")
    return sparsify(model, mask, always_train=[f"^{re.escape(name)}$" for name in dense])


def fine_tune(
    model: nn.Module,
    task: Task,
    config: RunConfig,
    seed: int,
    control: Control | None = None,
    state: Path | None = None,
) -> dict[str, Any] | None:
    """Train a sparse model in place on the train split. Collective where torch.distributed is initialised.

    At equal seed the batches are equal, whatever the mask and the number of ranks; the dropout stream is a rank's own.
    Weight decay leaves biases and norms alone, as in the Trainer.

    Args:
        state: the folder of the training's state, which all ranks share; what it holds of this training goes on.

    Returns:
        Where the loss began and ended, steps of an earlier run included; see `irdscale.training.loss_trend.loss_trend`.

    Raises:
        InputError: `train.batch_size` does not divide among the ranks, or `train.deepspeed` cannot be used.
        TrainingError: a loss is NaN or infinite; names the step and the learning rate.
        RunError: a rank died (named), or the state cannot be written.
        Paused: `control` asked for it, and there is a `state` to go on from.
        KeyboardInterrupt: of a signal to any rank; with a `state`, that is saved first.
    """
    control = control or Control()
    train, steps = config.train, training_steps(config.train, len(task.trained))
    settings = zero_settings(config, rank_and_world()[1])
    micro = micro_batch(config, rank_and_world()[1])
    made_by = {
        "train": train.model_dump(mode="json", exclude={*HOW_TO_TRAIN, "adapter_dtype"}),
        "seed": seed,
        **trained_on(model),
    }
    same_on_every_rank({"training": digest(made_by)})
    with failing_together():
        done = 0 if state is None else saved_step(state, made_by)
    done = largest_of([done])[0]
    (control.resumed or control.advance)(done)
    absolute = train.decay == "weight" and train.weight_decay > 0
    for entries in sparse_state(model).entries.values():
        entries.make_absolute(absolute)
    order = training_order(len(task.trained), steps * train.batch_size, seed)[done * train.batch_size :]
    losing: AbstractContextManager[None] = nullcontext()
    collate, own_loss = task.collate, False
    if done < steps:
        if task.is_language:
            losing, collate, own_loss = _text_loss(model, task)
        elif train.batch_size > 1:
            _say_if_padding_matters(model, task)
    if train.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
    losses = saved_losses(state) if state is not None and done else []
    callback = _Callback(seed, done, control, state, train.save_minutes, made_by, losses)
    with tempfile.TemporaryDirectory() as scratch, watched() if done < steps else nullcontext():
        if done < steps:
            trainer = _SparseTrainer(
                model=model,
                args=_arguments(scratch, train, settings, micro, steps - done, seed),
                train_dataset=task.trained.select(order),
                data_collator=collate,
                callbacks=[callback],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train_config, trainer.done, trainer.steps, callback.trainer = train, done, steps, trainer
            # A text counts by its tokens, of all ranks and accumulated passes; any other sample alike wherever it is. A
            # loss of the model's own is that of each pass: what it has beside tokens does not add up over passes.
            trainer.model_accepts_loss_kwargs = task.is_language and not own_loss
            try:
                with losing, nullcontext() if state is None else deferred():
                    trainer.train()
                release_engine(trainer.model_wrapped)
                losses = callback.losses()
            finally:
                forget_settings()
        elif done:
            assert state is not None
            load_values(state, model)
    if train.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_disable()
    for entries in sparse_state(model).entries.values():
        entries.make_absolute(False)
    model.eval()
    return loss_trend(losses)


def _say_if_padding_matters(model: nn.Module, task: Task) -> None:
    to_gpu(model)
    with gathering(model), frozen(model), unheard(model):
        matters = padding_known_to_matter(model, task.collate, task.trained)
    if matters and rank_and_world()[0] == 0:
        warn_once(
            f"train.batch_size: what {type(model).__name__} makes of a sample depends on how far its batch is padded; "
            f"metrics depend on the batch size"
        )


def _text_loss(model: nn.Module, task: Task) -> tuple[AbstractContextManager[None], Callable[..., Any], bool]:
    """What the model gives the mean loss of a batch's target tokens in, without the logits of all at once; its collate;
    and whether the model's own loss is another, which is then trained on.

    Batches come with the places of their targets, which are counted before the device has them.
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


def _arguments(
    scratch: str, train: TrainConfig, settings: dict[str, Any] | None, micro: int, steps: int, seed: int
) -> TrainingArguments:
    """Training arguments that write and print nothing, for one device a rank."""
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",
        seed=seed,
        data_seed=seed,
        deepspeed=settings,
        use_cpu=not gpu,
        ddp_backend="gloo" if current_group() is not None and not gpu else None,
        ddp_find_unused_parameters=False,
        save_strategy="no",
        logging_strategy="no",
        # It asks the device in each pass; all losses are looked at, some steps at a time.
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        # Otherwise each batch waits until the device has done all that it was given before.
        accelerator_config={"non_blocking": gpu},
        label_names=["labels"],
        # Samples are collated by the task, which takes what it needs.
        remove_unused_columns=False,
    )
    # The Trainer would copy the model to every GPU it sees (DataParallel), and the copies would not train.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class _Callback(TrainerCallback):
    """Sets the random streams, stops at a loss that is no number, and saves the state.

    Losses stay on the device until a look: reading one waits for all work that was given to the device before it. A
    look comes about once a second, and before everything that others see: a saved state, a rung, the end.
    """

    trainer: _SparseTrainer

    def __init__(
        self,
        seed: int,
        done: int,
        control: Control,
        state: Path | None,
        minutes: float,
        made_by: dict[str, Any],
        losses: list[float],
    ) -> None:
        self._earlier = losses
        self._seed, self._done, self._control, self._state = seed, done, control, state
        self._seconds, self._made_by = 60 * minutes, made_by
        self._alone = rank_and_world()[1] == 1
        self._saved, self._due, self._pausing, self._interrupted = time.monotonic(), False, False, False
        # Steps to the next look, and from the last one to it.
        self._left = self._between = 1
        self._looked = time.monotonic()

    def losses(self) -> list[float]:
        """The loss of each step, those of an earlier run first: the mean of what the ranks found; collective."""
        own = torch.tensor(self.trainer.step_losses(), dtype=torch.float64)
        all_reduce_sum([own])
        return [*self._earlier, *(own / rank_and_world()[1]).tolist()]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        # Nothing that came before, such as the size of a mask, may shift the dropout stream.
        rank = rank_and_world()[0]
        torch.manual_seed(self._seed if rank == 0 else digest_seed(rank, self._seed))
        if self._done:
            assert self._state is not None
            load_training(self._state, self.trainer.plain_model, self.trainer.optimizer, self._done)
        self._looked = time.monotonic()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._done and self.trainer.state.global_step == 0:
            assert self._state is not None
            load_generators(self._state, self._done)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Look, if it is time to; DeepSpeed has made its step already, which a bad loss spoils."""
        step = self._done + self.trainer.state.global_step + 1
        self._left -= 1
        if self._left <= 0 or step == self.trainer.steps or step in self._control.rungs:
            self._look(step, self._is_due(), self._is_pausing(), self._is_interrupted())
        elif self._alone:
            # One rank need not agree with others, so it answers at once.
            due, pausing, interrupted = self._is_due(), self._is_pausing(), self._is_interrupted()
            if due or pausing or interrupted:
                self._look(step, due, pausing, interrupted)

    def _is_due(self) -> bool:
        return self._state is not None and time.monotonic() - self._saved >= self._seconds

    def _is_pausing(self) -> bool:
        return rank_and_world()[0] == 0 and self._control.pausing()

    def _is_interrupted(self) -> bool:
        # Who asks for a pause gets that.
        return self._state is not None and wanted() and not self._control.pausing()

    def _long_unsaved(self) -> bool:
        """Whether a rank trained so long since the last saved state that an end before all is measured would cost."""
        return self._state is not None and largest_of([time.monotonic() - self._saved >= WORTH_S])[0] > 0

    def _look(self, step: int, due: bool, pausing: bool, interrupted: bool) -> None:
        """Read the losses, and have all ranks agree on what any of them found, and on when to look again; collective.

        Raises:
            TrainingError: a loss of any rank is no number.
        """
        bad = self.trainer.read_losses()
        made = self._between - max(0, self._left)
        each = max(time.monotonic() - self._looked, 1e-6) / made
        between = max(1, int((LOOK_S if self._state is None else min(LOOK_S, self._seconds)) / each))
        *flags, between = largest_of([bad is not None, due, pausing, interrupted, between])
        found, self._due, self._pausing, self._interrupted = map(bool, flags)
        if found:
            said = gather_texts("" if bad is None else f"{bad[0]} {bad[1]}")
            steps = {rank: int(text.partition(" ")[0]) for rank, text in enumerate(said) if text}
            # By a shared gradient one rank's bad loss is every rank's in the next step, so the earliest one tells.
            rank = min(steps, key=lambda rank: (steps[rank], rank))
            text = said[rank].partition(" ")[2]
            raise TrainingError(text if len(said) == 1 else f"rank {rank}: {text}")
        self._left = self._between = between

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._control.advance(1)
        step = self._done + self.trainer.state.global_step
        for made, loss, rate in self.trainer.take_seen():
            if self._control.seen is not None:
                self._control.seen(made, loss, rate)
        last = step == self.trainer.steps
        if last and not self._interrupted and not self._long_unsaved():
            return
        if step in self._control.rungs:
            self._control.at_rung(step)
        if self._state is not None and (last or self._due or self._pausing or self._interrupted):
            self._due = False
            model, optimizer = self.trainer.plain_model, self.trainer.optimizer
            save_training(self._state, model, optimizer, step, self._made_by, self.losses())
            self._saved = time.monotonic()
            if self._interrupted:
                raise KeyboardInterrupt
            if self._pausing and not last:
                raise Paused(f"paused after step {step}")
        if self._left == self._between:
            # Neither a rung nor a saved state is a part of what a step takes.
            self._looked = time.monotonic()


class _SparseTrainer(Trainer):
    """Takes the samples in the order in which they come, notices a loss that is no number, and can begin later.

    Attributes:
        done: steps that an earlier run has made.
        steps: of the whole training, which the learning rate follows.
        train_config: how to train.
    """

    train_config: TrainConfig
    done, steps = 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of each pass: its step, its loss, still on the device, and its learning rate.
        self._unread: list[tuple[int, Tensor, float]] = []
        self._seen: dict[int, tuple[float, float]] = {}
        self._losses: dict[int, float] = {}

    @property
    def plain_model(self) -> nn.Module:
        """The sparse model inside whatever wraps it."""
        return cast(nn.Module, self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(cast(Any, train_dataset or self.train_dataset))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else 0.0
        self._unread.append((self.done + self.state.global_step + 1, loss, float(rate)))
        return loss

    def read_losses(self) -> tuple[int, str] | None:
        """Read all losses since the last time, in one transfer; the step of the first bad one, and what is wrong."""
        unread, self._unread = self._unread, []
        if not unread:
            return None
        for (step, _, rate), loss in zip(unread, torch.stack([loss for _, loss, _ in unread]).tolist(), strict=True):
            if not math.isfinite(loss):
                return step, f"the loss is {loss} at step {step}, learning rate {rate:.3g}"
            self._seen[step] = loss, rate
            # The Trainer has divided the loss of a pass by their number.
            self._losses[step] = self._losses.get(step, 0.0) + loss
        return None

    def step_losses(self) -> list[float]:
        """The loss of each step that was read, as this rank found it."""
        return list(self._losses.values())

    def take_seen(self) -> list[tuple[int, float, float]]:
        """Each read step, the loss of its last pass and its learning rate, once."""
        seen, self._seen = self._seen, {}
        return [(step, *found) for step, found in seen.items()]

    def floating_point_ops(self, inputs: Any) -> int:
        """0: nobody asks, and counting walks over all parameters in each pass."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Left where it is: nobody asks, and reading it waits for the device."""
        return grad_norm

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate of the whole training, from the step at which this one begins."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            warmup = round(self.train_config.warmup_ratio * self.steps)
            shape = torch.optim.SGD([torch.zeros(1)], lr=1.0)
            (factor,) = get_scheduler(self.train_config.schedule, shape, warmup, self.steps).lr_lambdas
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(self.done + step))
            self._created_lr_scheduler = True
        return self.lr_scheduler


def adapter_dtype(config: RunConfig) -> torch.dtype | None:
    """The data type of an adapter's stored deltas; None for the one in which they were trained."""
    return torch.bfloat16 if config.train.adapter_dtype == "bfloat16" else None


def adapter_config(config: RunConfig, task: Task, seed: int) -> dict[str, Any]:
    """What an adapter's folder says about how it was made; `counted` are its classes as metrics count them."""
    sections = config.model_dump(mode="json", include={"model", "task", "train"})
    counted = {} if task.class_order is None else {"counted": [task.label_names[place] for place in task.class_order]}
    return {**sections, "seed": seed, **counted}
