"""Models whose parameters DeepSpeed ZeRO-3 keeps in partitions over the ranks, and those that it has not touched.

A partitioned parameter is empty but for the moments in which its module runs, so its shape is read from DeepSpeed's
own record, and its values only inside `whole`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.utils.quantized import quantized_shape

# Where a model keeps how it is gathered.
_OPTIONS = "_irdscale_gathering"


def unwrapped(model: Any) -> Any:
    """The model inside a DeepSpeed engine or DistributedDataParallel, whose own forward would do more than compute."""
    while type(model).__name__ in ("DeepSpeedEngine", "DistributedDataParallel"):
        model = model.module
    return model


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed has made partitions of the parameters."""
    return any(hasattr(p, "ds_tensor") for p in model.parameters())


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The whole parameter's shape; of a quantised weight, that of the matrix that it stands for."""
    return quantized_shape(parameter) or tuple(getattr(parameter, "ds_shape", parameter.shape))


def numel_of(parameter: Tensor) -> int:
    """Entries of the whole parameter; of a quantised weight, those of the matrix that it stands for."""
    shape = quantized_shape(parameter)
    return torch.Size(shape).numel() if shape else int(getattr(parameter, "ds_numel", parameter.numel()))


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes."""
    parameter = next(model.parameters())
    if hasattr(parameter, "ds_tensor") and torch.cuda.is_available():
        # Partitions may be kept in main memory, and are gathered on the GPU.
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def to_gpu(model: nn.Module) -> None:
    """Move a model to the GPU where there is one; one in partitions is DeepSpeed's to place."""
    if not is_partitioned(model):
        model.to("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def gathered_parameters(parameters: Sequence[Tensor], changed: bool = False) -> Iterator[None]:
    """Gather partitioned parameters; collective if there are any.

    Those that a running module has gathered are left to it.

    Args:
        changed: every rank writes the same numbers into them, and its part keeps them.
    """
    absent = [p for p in parameters if hasattr(p, "ds_tensor") and (changed or p.numel() != numel_of(p))]
    if not absent:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(absent, modifier_rank=0 if changed else None):
        yield


def gather_by(model: nn.Module, options: dict[str, int]) -> None:
    """Set how `gathering` gathers a partitioned model, by DeepSpeed's options."""
    vars(model)[_OPTIONS] = options


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Have a partitioned model's modules gather their parameters when they run.

    A DeepSpeed engine's model does so already; for one that was only loaded into partitions the hooks are set here
    and removed at the end.
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
        # After an error gatherings may be under way, which cannot be called back.
        offload.partition_all_parameters()
    finally:
        offload.destroy()
        _clear_traces(model)


def release_engine(engine: Any) -> None:
    """Take a DeepSpeed engine off its model, whose parameters stay in their partitions; anything else is left alone."""
    if type(engine).__name__ != "DeepSpeedEngine":
        return
    model = engine.module
    if is_partitioned(model):
        engine.optimizer.parameter_offload.partition_all_parameters()
    engine.destroy()
    _clear_traces(model)


def _clear_traces(model: nn.Module) -> None:
    """Remove what DeepSpeed's hooks leave in the modules."""
    for module in model.modules():
        if "_original_parameters" in module.__dict__:
            module._parameters = module.__dict__.pop("_original_parameters")
        for attribute in ("pre_bwd_fn", "post_bwd_fn", "ds_inflight_param_registry"):
            module.__dict__.pop(attribute, None)
