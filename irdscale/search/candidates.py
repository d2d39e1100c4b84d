"""One candidate from its mask to its metric: train it, evaluate it and save its adapter."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from irdscale.adapters import load_adapter, save_adapter
from irdscale.config.compare import LoraConfig
from irdscale.config.schema import RunConfig, TrainConfig, result_settings, training_steps
from irdscale.distributed.ranks import broadcast_flag, failing_together, rank_and_world, remove_folder
from irdscale.errors import InputError, RunError, TrainingError
from irdscale.masks.mask import Mask
from irdscale.memory.peak import peak_bytes, start_peak
from irdscale.search.ird import Pair
from irdscale.search.ledger import evaluation_key
from irdscale.search.mask_store import mask_folder
from irdscale.training.base_model import base_model
from irdscale.training.control import Control, Paused, shown
from irdscale.training.evaluate import evaluate_model, evaluate_with_errors
from irdscale.training.metrics_file import NAME as METRICS
from irdscale.training.recorder import Records
from irdscale.training.trainable import make_sparse, put_lora
from irdscale.training.trainer import adapter_config, adapter_dtype, fine_tune
from irdscale.utils.progress import bar

if TYPE_CHECKING:
    from irdscale.tasks import Task

log = logging.getLogger(__name__)
NO_MASK = "none"


@dataclass(frozen=True)
class Candidate:
    """One evaluation: a mask and a seed, or another way of fine-tuning as a baseline.

    Attributes:
        mask: hash of the mask; None to train only the parameters of `train.always_train`, such as the head.
        round: round of the search; None for a baseline.
        direction: how the samples were chosen.
        train: training configuration; the run's if None.
        lora: adapter by PEFT that is trained, alone or beside a mask; the rank is a number.
    """

    mask: str | None
    pair: Pair
    seed: int
    round: int | None
    direction: str
    train: TrainConfig | None = None
    lora: LoraConfig | None = None

    def config(self, config: RunConfig) -> RunConfig:
        """The run's configuration with this candidate's training."""
        return config if self.train is None else config.model_copy(update={"train": self.train})

    def key(self, config: RunConfig) -> str:
        """The evaluation's key in the ledger."""
        parts = [self.mask, None if self.lora is None else lora_key(self.lora)]
        trained = "+".join(part for part in parts if part is not None) or NO_MASK
        train = result_settings(self.config(config).train.model_dump(mode="json"))
        if train["deepspeed"] is not None:
            # The path may change; an output folder belongs to one content of the file.
            train["deepspeed"] = Path(train["deepspeed"]).name
        return evaluation_key(trained, train, self.seed)

    def name(self, config: RunConfig) -> str:
        """A name for folders and trackers that no other evaluation of the run has."""
        # Outside a round, draws of equal size differ by their masks alone.
        stage, own = f"round{self.round}", ""
        if self.round is None:
            stage, own = re.sub(r"[^\w.-]+", "-", self.direction), f"-{self.key(config)[:8]}"
        rate = "" if self.train is None else f"-rate{self.train.learning_rate:g}"
        sizes = f"{self.pair.samples}samples-{self.pair.params}parameters"
        return f"{stage}-{sizes}{rate}-seed{self.seed}{own}"

    def record(self, config: RunConfig) -> dict[str, Any]:
        """A ledger record with status failed and no error yet."""
        return {
            "round": self.round,
            "samples": self.pair.samples,
            "params": self.pair.params,
            "seed": self.seed,
            "direction": self.direction,
            "mask": self.mask,
            "metric": None,
            "status": "failed",
            "error": None,
            "seconds": 0.0,
            "key": self.key(config),
        }

    def __str__(self) -> str:
        return in_words(self.pair.samples, self.pair.params, self.seed, self.direction)


def in_words(samples: int, params: int, seed: int, direction: str) -> str:
    """A candidate in bars and messages: `128 samples, 113,570 trained, seed 1`, or its direction instead of sizes."""
    sizes = [f"{samples:,} samples"] if samples else []
    sizes += [f"{params:,} trained"] if params else []
    return ", ".join([*(sizes or [direction]), f"seed {seed}"])


def lora_key(lora: LoraConfig) -> str:
    """What tells the adapter from others in the ledger: its rank, and the options that are not the defaults."""
    others = lora.model_dump(mode="json", exclude={"rank"}, exclude_defaults=True)
    return "-".join(["lora", str(lora.rank), *([json.dumps(others, sort_keys=True)] if others else [])])


def candidate_adapter(output: Path, key: str) -> Path:
    """Folder of an evaluation's adapter, kept while it may be the winner's."""
    return output / "candidates" / key


def state_folder(output: Path, key: str) -> Path:
    """Folder of the saved training state of an unfinished evaluation."""
    return output / "candidates" / f"state-{key}"


def records_of(config: RunConfig, output: Path, candidate: Candidate) -> Records:
    """Where the metrics of a candidate's training go."""
    name = candidate.name(config)
    return Records(output / "trainings" / name / METRICS, name, output / "tensorboard" / name)


def run_candidate(
    config: RunConfig,
    task: Task,
    output: Path,
    candidate: Candidate,
    control: Control | None = None,
    report: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train a candidate, evaluate it on the selection split and save its adapter; collective. Returns its record.

    Args:
        report: called on every rank with step and metric at each rung of `control`.

    Raises:
        InputError, RunError: an error of the whole run, such as a missing file or a full disk.
        Paused: `control` asked for a pause; the training state is saved.
        Exception: one of several ranks failed alone.
    """
    started, key = time.perf_counter(), candidate.key(config)
    record, records = candidate.record(config), records_of(config, output, candidate)
    config = candidate.config(config)
    model: nn.Module | None = None

    def measure() -> float:
        assert model is not None
        metric = evaluate_model(model, task, task.selection, config.train.eval_batch_size)[task.metric]
        if not math.isfinite(metric):
            raise TrainingError(f"the {task.metric} on the selection split is {metric}")
        return metric

    control = replace(control or Control(), kept=lambda step: record.update(kept_step=step))
    if report is not None:
        control = replace(control, at_rung=lambda step: report(step, measure()))
    start_peak()
    with ExitStack() as lent:
        try:
            model = lent.enter_context(_untrained(config, task, output, candidate))
            trend = fine_tune(model, task, config, candidate.seed, control, state_folder(output, key), records)
            record |= {"peak_bytes": peak_bytes(), "metric": measure(), "status": "ok", "loss": trend}
        except Paused:
            raise
        except Exception as error:  # the search goes on without this candidate
            agreed = isinstance(error, TrainingError)
            if isinstance(error, InputError | RunError) and not agreed:
                raise
            # If one rank fails alone, the others would wait for it.
            if rank_and_world()[1] > 1 and not agreed:
                raise
            record["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("%s failed: %s", candidate, record["error"])
        if model is not None and record["status"] == "ok":
            folder = candidate_adapter(output, key)
            save_adapter(model, folder, config=adapter_config(config, task, candidate.seed))
            with failing_together():
                if rank_and_world()[0] == 0:
                    record["adapter_bytes"] = (folder / "adapter.safetensors").stat().st_size
    remove_folder(state_folder(output, key))
    return record | {"seconds": round(time.perf_counter() - started, 3)}


def score_on_test(
    config: RunConfig, task: Task, output: Path, asked: list[tuple[Candidate, bool]]
) -> list[tuple[float, float]]:
    """Test metric and its standard error of each finished evaluation; collective.

    Loads each adapter, or trains it again if it was deleted.

    Args:
        asked: candidates, each with whether to save its adapter in OUTPUT/adapter.
    """
    metrics = []
    for candidate, keep in asked:
        own = candidate.config(config)
        with _trained(config, task, output, candidate) as model:
            values, errors = evaluate_with_errors(model, task, task.test, own.train.eval_batch_size)
            metrics.append((values[task.metric], errors[task.metric]))
            if keep:
                save_adapter(model, output / "adapter", adapter_config(own, task, candidate.seed), adapter_dtype(own))
    return metrics


@contextmanager
def _trained(config: RunConfig, task: Task, output: Path, candidate: Candidate) -> Iterator[nn.Module]:
    key, own, seed = candidate.key(config), candidate.config(config), candidate.seed
    folder = candidate_adapter(output, key)
    if broadcast_flag(folder.exists()):
        with base_model(own, task, seed) as (model, new):
            put_lora(own, model, new, seed, candidate.lora)
            yield load_adapter(model, folder)
        return
    with _untrained(own, task, output, candidate) as trained:
        # Without a bar, but a progress listener still hears of it.
        with bar("Training", training_steps(own.train, len(task.trained)), enabled=False) as advance:
            fine_tune(trained, task, own, seed, shown(advance), state_folder(output, key))
        save_adapter(trained, folder, config=adapter_config(own, task, seed))
        remove_folder(state_folder(output, key))
        yield trained


def score_base(config: RunConfig, task: Task, output: Path) -> tuple[float, float, float]:
    """The untrained base model's selection metric, test metric and standard error on test; collective."""
    size = config.train.eval_batch_size
    with base_model(config, task, config.search.seeds[0]) as (model, _):
        selection = evaluate_model(model, task, task.selection, size)
        test, errors = evaluate_with_errors(model, task, task.test, size)
    return selection[task.metric], test[task.metric], errors[task.metric]


@contextmanager
def _untrained(config: RunConfig, task: Task, output: Path, candidate: Candidate) -> Iterator[nn.Module]:
    mask = None if candidate.mask is None else Mask.load(mask_folder(output, candidate.mask))
    with base_model(config, task, candidate.seed) as (model, new):
        yield make_sparse(config, model, new, mask, candidate.seed, candidate.lora)
