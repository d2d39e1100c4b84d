"""Checkpoints of a training, from which it resumes with any number of ranks and any ZeRO stage.

    FOLDER/state.json            step, and hash of the settings that the training depends on; with `train.keep: best`
                                 step and metric of the best evaluation so far
    FOLDER/numbers.safetensors   value/NAME, exp_avg/NAME, exp_avg_sq/NAME of every trained parameter, gathered;
                                 rng/RANK; losses, one per step; best/NAME, the value at the best evaluation

A checkpoint takes 12 bytes per trained parameter, 16 with `train.keep: best`; frozen parameters are not stored. Tensors
are gathered from all ranks, so the files do not depend on the number of ranks or DeepSpeed's partitions. DeepSpeed's
own checkpoints, which are pickled, are not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.distributed.ranks import all_reduce_sum, failing_together, gather_flat, rank_and_world
from irdscale.distributed.zero3 import gathered_parameters, numel_of, shape_of
from irdscale.errors import InputError
from irdscale.utils.files import digest, read_tensors, read_versioned, write_folder, write_json

FORMAT = "irdscale-training"
VERSION = 1
WHAT = "training state"
LOSSES = "losses"
VALUE, MOMENTS, BEST = "value", ("exp_avg", "exp_avg_sq"), "best"


@dataclass(frozen=True)
class Best:
    """The best evaluation of a training so far.

    Attributes:
        values: name -> value of each trained parameter at that step, gathered, on the CPU.
    """

    step: int
    metric: float
    values: dict[str, Tensor]


def save_training(
    folder: Path,
    model: nn.Module,
    optimizer: Any,
    step: int,
    made_by: dict[str, Any],
    losses: list[float],
    best: Best | None = None,
) -> None:
    """Replace the saved state by the state after `step` optimizer steps. Collective; rank 0 writes.

    Args:
        optimizer: AdamW, or DeepSpeed's wrapper of it.
        made_by: settings that the training depends on, by name.
        losses: loss of each step made.
        best: the best evaluation so far, of a training that keeps it.

    Raises:
        RunError: the state cannot be written; the earlier state stays.
    """
    from safetensors.torch import save_file

    tensors = {LOSSES: torch.tensor(losses, dtype=torch.float64), **_generators()}
    for key in (VALUE, *MOMENTS):
        tensors |= {f"{key}/{name}": found for name, found in _gathered(_trained(model), optimizer, key).items()}
    if best is not None:
        tensors |= {f"{BEST}/{name}": value for name, value in best.values.items()}

    def fill(target: Path) -> None:
        save_file(tensors, target / "numbers.safetensors")
        meta: dict[str, Any] = {"format": FORMAT, "version": VERSION, "step": step, "made_by": digest(made_by)}
        if best is not None:
            meta[BEST] = {"step": best.step, "metric": best.metric}
        write_json(target / "state.json", meta)

    with failing_together():
        if rank_and_world()[0] == 0:
            write_folder(folder, fill)


def saved_step(folder: Path, made_by: dict[str, Any]) -> int:
    """Steps of this training's saved state; 0 without one, or if it belongs to another training.

    Raises:
        InputError: the files are damaged.
    """
    file = folder / "state.json"
    if not file.exists():
        return 0
    meta = read_versioned(file, WHAT, FORMAT, VERSION)
    return int(meta["step"]) if meta.get("made_by") == digest(made_by) else 0


def saved_losses(folder: Path) -> list[float]:
    """The loss of each step up to the saved state."""
    return read_tensors(folder / "numbers.safetensors", WHAT)[LOSSES].tolist()


def saved_best(folder: Path, model: nn.Module) -> Best | None:
    """The best evaluation up to the saved state; None if it has none. Collective.

    Raises:
        InputError: the files are damaged.
    """
    with failing_together():
        found = read_versioned(folder / "state.json", WHAT, FORMAT, VERSION).get(BEST)
        if found is None:
            return None
        parameters = _trained(model)
        tensors = _read(folder, parameters, (BEST,))
        values = {name: tensors[f"{BEST}/{name}"] for name in parameters}
        return Best(int(found["step"]), float(found["metric"]), values)


def trained_values(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Name -> value of each trained parameter, gathered from all ranks, on the CPU. Collective."""
    return _gathered(_trained(model), optimizer, VALUE)


def put_values(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Give the trained parameters these values. Collective; an optimizer's own copies stay."""
    for name, parameter in _trained(model).items():
        with gathered_parameters([parameter], changed=True):
            parameter.data.copy_(values[name])


def load_training(folder: Path, model: nn.Module, optimizer: Any = None, step: int = 0) -> None:
    """Load the saved values, and into `optimizer`, if given, the moments after `step` steps. Collective.

    Raises:
        InputError: the files are damaged.
    """
    keys = (VALUE,) if optimizer is None else (VALUE, *MOMENTS)
    with failing_together():
        parameters = _trained(model)
        tensors = _read(folder, parameters, keys)
    if optimizer is not None:
        _make_moments(parameters, optimizer, step)
    for name, parameter in parameters.items():
        for key in keys if optimizer is not None else ():
            own = _own_part(parameter, optimizer, key)
            if own is not None:
                part, start, stop = own
                value = tensors[f"{key}/{name}"].reshape(-1)[start:stop]
                part.data[: len(value)].copy_(value)
        with gathered_parameters([parameter], changed=True):
            parameter.data.copy_(tensors[f"{VALUE}/{name}"])


def _read(folder: Path, parameters: dict[str, nn.Parameter], keys: tuple[str, ...]) -> dict[str, Tensor]:
    file = folder / "numbers.safetensors"
    tensors = read_tensors(file, WHAT)
    for name, parameter in parameters.items():
        for key in keys:
            found = tensors.get(f"{key}/{name}")
            if found is None or tuple(found.shape) != shape_of(parameter):
                raise InputError(f"damaged {WHAT}: no {key} for {name}", where=file)
    return tensors


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _generators() -> dict[str, Tensor]:
    """States of every rank's random generators."""
    world = rank_and_world()[1]
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    own = torch.cat(states)
    return dict(zip([f"rng/{r}" for r in range(world)], gather_flat(own, [len(own)] * world).split(len(own))))


def load_generators(folder: Path, step: int) -> None:
    """Restore this rank's random generators; call it last, because the start of a training draws from them."""
    rank = rank_and_world()[0]
    own = read_tensors(folder / "numbers.safetensors", WHAT).get(f"rng/{rank}")
    cpu = len(torch.get_rng_state())
    if own is None:
        # The saved training had fewer ranks.
        torch.manual_seed(digest_seed(rank, step))
        return
    torch.set_rng_state(own[:cpu])
    if len(own) > cpu and torch.cuda.is_available():
        torch.cuda.set_rng_state(own[cpu:])


def digest_seed(rank: int, step: int) -> int:
    """Seed of a rank without a saved random generator."""
    return int(digest([rank, step]), 16) % 2**31


def _gathered(parameters: dict[str, nn.Parameter], optimizer: Any, key: str) -> dict[str, Tensor]:
    """AdamW's values of the trained parameters, or one of their moments, gathered on the CPU. Collective."""
    first = next(iter(parameters.values()))
    divided = hasattr(first, "ds_id") or hasattr(first, "_hp_mapping")
    dtype = torch.float32 if divided else first.dtype
    flat = torch.zeros(sum(map(numel_of, parameters.values())), dtype=dtype)
    parts = dict(zip(parameters, flat.split([numel_of(p) for p in parameters.values()])))
    for name, parameter in parameters.items():
        own = _own_part(parameter, optimizer, key)
        if own is not None:
            part, start, stop = own
            parts[name][start:stop] = part.detach()[: stop - start].cpu()
    if divided:
        all_reduce_sum([flat])
    return {name: parts[name].view(shape_of(p)).clone() for name, p in parameters.items()}


def _own_part(parameter: Any, optimizer: Any, key: str) -> tuple[Tensor, int, int] | None:
    """This rank's part of a parameter or moment, flat, and its range of entries; None if it has no part."""
    numel, (rank, _) = numel_of(parameter), rank_and_world()
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        part = (
            safe_get_local_fp32_param(parameter) if key == VALUE else safe_get_local_optimizer_state(parameter, key)
        ).view(-1)
        start = min(rank * len(part), numel)
        return part, start, min(start + len(part), numel)
    if hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        held = _zero(optimizer).single_partition_of_fp32_groups[mapping.param_group_index]
        flat = held if key == VALUE else _plain(optimizer).state[held][key]
        place, own = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat.narrow(0, place.start, place.numel), own.start, own.start + own.numel
    flat = parameter.data if key == VALUE else _plain(optimizer).state[parameter][key]
    return flat.view(-1), 0, numel


def _plain(optimizer: Any) -> Any:
    """The torch optimizer inside the wrappers of DeepSpeed and accelerate."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _zero(optimizer: Any) -> Any:
    """DeepSpeed's ZeRO optimizer inside accelerate's wrapper."""
    while not hasattr(optimizer, "fp32_partitioned_groups_flat") and not hasattr(optimizer, "bit16_groups"):
        optimizer = optimizer.optimizer
    return optimizer


def _make_moments(parameters: dict[str, nn.Parameter], optimizer: Any, step: int) -> None:
    """Create zero moments; AdamW creates them only at its first step."""
    first = next(iter(parameters.values()))
    if hasattr(first, "ds_id"):
        held = _zero(optimizer).fp32_partitioned_groups_flat
    elif hasattr(first, "_hp_mapping"):
        held = _zero(optimizer).single_partition_of_fp32_groups
    else:
        held = list(parameters.values())
    for tensor in held:
        state = {key: torch.zeros_like(tensor, memory_format=torch.preserve_format) for key in MOMENTS}
        # A fused step reads the step count on the parameter's device.
        _plain(optimizer).state[tensor] = {"step": torch.tensor(float(step), device=tensor.device), **state}
