"""Shapes, devices and values of parameters, also of models that DeepSpeed ZeRO-3 partitions over the ranks.

A partitioned parameter is empty except while its module runs: its shape is in DeepSpeed's record, and its values are
available inside `gathered_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.utils.quantized import quantized_shape

# Attribute of a model with DeepSpeed's options for gathering it.
_OPTIONS = "_irdscale_gathering"


def unwrapped(model: Any) -> Any:
    """The model inside a DeepSpeed engine or DistributedDataParallel, whose forward has side effects."""
    while type(model).__name__ in ("DeepSpeedEngine", "DistributedDataParallel"):
        model = model.module
    return model


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed has partitioned the parameters."""
    return any(hasattr(p, "ds_tensor") for p in model.parameters())


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the full parameter; of a quantised weight, that of its dequantised matrix."""
    return quantized_shape(parameter) or tuple(getattr(parameter, "ds_shape", parameter.shape))


def numel_of(parameter: Tensor) -> int:
    """Entries of the full parameter; of a quantised weight, those of its dequantised matrix."""
    shape = quantized_shape(parameter)
    return torch.Size(shape).numel() if shape else int(getattr(parameter, "ds_numel", parameter.numel()))


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's computation."""
    parameter = next(model.parameters())
    if hasattr(parameter, "ds_tensor") and torch.cuda.is_available():
        # Partitions may be in main memory; they are gathered on the GPU.
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def to_gpu(model: nn.Module) -> None:
    """Move a model to the GPU, if there is one; DeepSpeed places a partitioned model itself."""
    if not is_partitioned(model):
        model.to("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def gathered_parameters(parameters: Sequence[Tensor], changed: bool = False) -> Iterator[None]:
    """Gather partitioned parameters for the body; collective if there are any.

    Parameters that a running module has gathered are left to it.

    Args:
        changed: whether the body writes to them: every rank the same values, which its partition keeps.
    """
    absent = [p for p in parameters if hasattr(p, "ds_tensor") and (changed or p.numel() != numel_of(p))]
    if not absent:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(absent, modifier_rank=0 if changed else None):
        yield


def gather_by(model: nn.Module, options: dict[str, int]) -> None:
    """Set DeepSpeed's options with which `gathering` gathers a partitioned model."""
    vars(model)[_OPTIONS] = options


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """In the body, a partitioned model's modules gather their parameters when they run.

    A DeepSpeed engine's model does so already; a model that was only loaded into partitions gets the hooks here, and
    loses them at the end.
    """
    if not is_partitioned(model) or "pre_bwd_fn" in model.__dict__:
        yield
        return
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils.timer import NoopTimer

    options = vars(model).get(_OPTIONS, {})
    offload = DeepSpeedZeRoOffload(model, NoopTimer(), {}, param_persistence_threshold=0, **options)
    try:
        yield
        # Not after an error: pending gathers cannot be cancelled.
        offload.partition_all_parameters()
    finally:
        offload.destroy()
        _remove_hook_state(model)


def release_engine(engine: Any) -> None:
    """Destroy a DeepSpeed engine; its model stays partitioned. Anything else than an engine is ignored."""
    if type(engine).__name__ != "DeepSpeedEngine":
        return
    model = engine.module
    if is_partitioned(model):
        engine.optimizer.parameter_offload.partition_all_parameters()
    engine.destroy()
    _remove_hook_state(model)


def _remove_hook_state(model: nn.Module) -> None:
    """Remove the attributes that DeepSpeed's hooks leave in the modules."""
    for module in model.modules():
        if "_original_parameters" in module.__dict__:
            module._parameters = module.__dict__.pop("_original_parameters")
        for attribute in ("pre_bwd_fn", "post_bwd_fn", "ds_inflight_param_registry"):
            module.__dict__.pop(attribute, None)
