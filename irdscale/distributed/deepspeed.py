"""The user's DeepSpeed JSON: checked against the configuration, and adapted for the Trainer and `from_pretrained`.

Trained parameters and their moments are float32 whatever the model's data type, so DeepSpeed's settings name no lower
precision; only loading into ZeRO-3 partitions needs the base's.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from irdscale.config.schema import RunConfig
from irdscale.errors import InputError

AUTO = "auto"


def zero_stage(config: RunConfig) -> int | None:
    """The ZeRO stage of `train.deepspeed`; None without such a file.

    Raises:
        InputError: as `zero_settings`.
    """
    settings = zero_settings(config)
    return None if settings is None else int(settings["zero_optimization"]["stage"])


def zero_settings(config: RunConfig, world: int | None = None) -> dict[str, Any] | None:
    """The contents of `train.deepspeed` for the Trainer; None without such a file. Imports nothing heavy.

    Args:
        world: number of ranks, to check the file's batch sizes; None if unknown.

    Raises:
        InputError: as `zero_file`, or deepspeed is not installed.
    """
    settings = zero_file(config, world)
    if settings is None:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"found {config.train.deepspeed}, but deepspeed is not installed",
            "it: pip install --no-build-isolation deepspeed",
            key="train.deepspeed",
        )
    # The optimizer is always torch's AdamW: for k parameters DeepSpeed's own is no faster.
    return {**settings, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def zero_file(config: RunConfig, world: int | None = None) -> dict[str, Any] | None:
    """The contents of `train.deepspeed`, checked; None without such a file.

    Args:
        world: see `zero_settings`.

    Raises:
        InputError: the file is missing or not a JSON object, contradicts the configuration (both values are named), or
            has unsupported settings.
    """
    if config.train.deepspeed is None:
        return None
    file = config.train.deepspeed
    try:
        settings = json.loads(Path(file).read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot read it: {error.strerror}", key="train.deepspeed") from error
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}", key="train.deepspeed") from error
    if not isinstance(settings, dict):
        raise InputError(f"{file}: found {type(settings).__name__}", "a JSON object", key="train.deepspeed")
    zero = settings.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise _found(file, "zero_optimization", zero, "a section")
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise _found(file, "zero_optimization.stage", stage, "0, 1, 2 or 3")
    _check_precision(file, settings, config.model.dtype)
    _check_offload(file, zero)
    _check_steps(file, settings, config, world)
    _drop_optimizer(file, settings)
    return settings


def _found(file: str, key: str, value: Any, expected: str) -> InputError:
    return InputError(f"{file}: {key}: found {json.dumps(value)}", expected, key="train.deepspeed")


def _enabled(settings: dict[str, Any], section: str) -> Any:
    """Remove a section; returns its value of `enabled`."""
    inside = settings.pop(section, {})
    return inside.get("enabled", False) if isinstance(inside, dict) else inside


def _check_precision(file: str, settings: dict[str, Any], dtype: str) -> None:
    if dtype == "float64":
        raise InputError("found 'float64' with train.deepspeed", "'float32' or 'bfloat16'", key="model.dtype")
    half = _enabled(settings, "fp16")
    if half is True:
        raise _found(file, "fp16.enabled", half, "false: set model.dtype=bfloat16 for a lower precision")
    bfloat = _enabled(settings, "bf16")
    if bfloat not in (AUTO, False) and (bfloat is True) != (dtype == "bfloat16"):
        raise _found(file, "bf16.enabled", bfloat, f"{AUTO!r}, as model.dtype is {dtype!r}")


def _check_offload(file: str, zero: dict[str, Any]) -> None:
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name)
        device = section.get("device", "none") if isinstance(section, dict) else section
        if device not in (None, "none", "cpu"):
            raise _found(file, f"zero_optimization.{name}.device", device, "'cpu' or 'none'")


def _check_steps(file: str, settings: dict[str, Any], config: RunConfig, world: int | None) -> None:
    train = config.train
    wanted: dict[str, Any] = {
        "train_batch_size": (train.batch_size, "train.batch_size"),
        "gradient_accumulation_steps": (train.gradient_accumulation, "train.gradient_accumulation"),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
    }
    if world is not None:
        micro = micro_batch(config, world)
        what = f"train.batch_size / {world} ranks / train.gradient_accumulation"
        wanted["train_micro_batch_size_per_gpu"] = (micro, what)
    for key, (value, what) in wanted.items():
        found = settings.setdefault(key, AUTO)
        if found not in (AUTO, value):
            raise _found(file, key, found, f"{AUTO!r}, or {value} as {what} has it")
        settings[key] = AUTO


def micro_batch(config: RunConfig, world: int) -> int:
    """Samples of one forward pass on one rank.

    Raises:
        InputError: `train.batch_size` is not a multiple of ranks x accumulated passes; suggests settings that are, with
            no more samples per pass.
    """
    batch, passes = config.train.batch_size, config.train.gradient_accumulation
    if batch % (world * passes):
        raise InputError(
            f"found {batch}",
            f"a multiple of {world * passes}: {world} rank(s) x train.gradient_accumulation {passes}; "
            f"{' '.join(_dividing(batch, passes, world))} would do",
            key="train.batch_size",
        )
    return batch // (world * passes)


def _dividing(batch: int, passes: int, world: int) -> list[str]:
    """Settings that divide a step's samples among the ranks; the batch size stays if it is a multiple of the ranks."""
    of_rank, most = -(-batch // world), max(1, batch // passes)
    fewest = next(count for count in range(1, of_rank + 1) if of_rank % count == 0 and of_rank // count <= most)
    changed = [] if of_rank * world == batch else [f"train.batch_size={of_rank * world}"]
    return changed + ([] if fewest == passes else [f"train.gradient_accumulation={fewest}"])


def _drop_optimizer(file: str, settings: dict[str, Any]) -> None:
    """Remove an optimizer section that agrees with the configuration."""
    optimizer = settings.pop("optimizer", None)
    if optimizer is not None:
        known = isinstance(optimizer, dict) and optimizer.get("type") == "AdamW"
        values = optimizer.get("params", {}).values() if known else []
        if not known or any(value != AUTO for value in values):
            raise _found(file, "optimizer", optimizer, "none, or AdamW with 'auto' values: see train.learning_rate")
    if settings.get("scheduler") is not None:
        raise _found(file, "scheduler", settings["scheduler"], "none: see train.schedule and train.warmup_ratio")


def gathering_options(zero: dict[str, Any], hidden: int) -> dict[str, int]:
    """DeepSpeed's options for gathering ZeRO-3 partitions, with the Trainer's values for `auto`.

    Args:
        zero: section `zero_optimization` of a DeepSpeed file.
        hidden: width of the model.
    """
    auto = {"prefetch_bucket_size": 0.9 * hidden * hidden}
    usual = {"prefetch_bucket_size": 5e7, "max_live_parameters": 1e9, "max_reuse_distance": 1e9}
    found = {key: zero.get(f"stage3_{key}", value) for key, value in usual.items()}
    return {key: int(auto.get(key, usual[key]) if value == AUTO else value) for key, value in found.items()}


@contextmanager
def loading(config: RunConfig) -> Iterator[None]:
    """In the body, `from_pretrained` loads straight into partitions if `train.deepspeed` sets ZeRO-3."""
    settings = zero_settings(config)
    if settings is None or settings["zero_optimization"]["stage"] != 3:
        yield
        return
    compile_nothing()
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    settings = {key: value for key, value in settings.items() if value != AUTO}
    # This sets the data type of the partitions; the training's settings name none.
    settings |= {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": config.model.dtype == "bfloat16"}}
    settings["zero_optimization"] = {k: v for k, v in settings["zero_optimization"].items() if v != AUTO}
    # Transformers keeps a weak reference to it.
    known = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        forget_settings()
        del known


def compile_nothing() -> None:
    """Keep DeepSpeed from compiling collectives over shared memory: training calls none of them.

    On a CPU it would do so at its start, which takes a C++ compiler and a minute.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def forget_settings() -> None:
    """Undo DeepSpeed's global settings, by which `from_pretrained` loads all models into partitions with ZeRO-3."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    # Accelerate sets this variable, and would use ZeRO-2 from then on.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
