"""The model of a training: which parameters are trained, sparsely or densely; and the base model with an adapter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from irdscale.adapters import load_adapter
from irdscale.adapters.heads import adapter_seed
from irdscale.adapters.hub import find_adapter
from irdscale.config.compare import LoraConfig
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.masks.mask import Mask
from irdscale.models.build import build_model
from irdscale.models.lora import insert_lora
from irdscale.sparse import matching_parameters, sparsify

if TYPE_CHECKING:
    from irdscale.tasks import Task


def trained_densely(config: RunConfig, model: nn.Module, new: list[str]) -> list[str]:
    """Names of the parameters that are trained outside the mask.

    Args:
        new: parameters that the checkpoint does not hold; `train.always_train: auto` trains these.

    Raises:
        InputError: an expression of `train.always_train` matches no parameter.
    """
    if config.train.always_train == "auto":
        return new
    return matching_parameters(dict(model.named_parameters()), config.train.always_train)


def put_lora(config: RunConfig, model: nn.Module, new: list[str], seed: int, lora: LoraConfig | None) -> list[str]:
    """Insert LoRA matrices (none for None) into a model's linear layers, in place, initialised by `seed`.

    Args:
        new: parameters that the checkpoint does not hold.
        lora: options of the matrices; the rank is a number.

    Returns:
        Names of the parameters that are trained outside a mask: these matrices and the head.

    Raises:
        InputError: as `trained_densely` and `irdscale.models.lora.insert_lora`.
    """
    dense = trained_densely(config, model, new)
    return dense if lora is None else [*dense, *insert_lora(model, lora, seed, dense)]


def sparse_model(
    config: RunConfig, task: Task, mask: Mask | None, seed: int, lora: LoraConfig | None = None
) -> nn.Module:
    """The task's model with the mask's entries trainable (none for no mask), and a head initialised by `seed`.

    Args:
        lora: adapter by PEFT to train, alone or beside a mask.

    Raises:
        InputError: the mask does not fit the model, or there is nothing to train.
    """
    model, new = build_model(config, task, seed)
    return make_sparse(config, model, new, mask, seed, lora)


def make_sparse(
    config: RunConfig, model: nn.Module, new: list[str], mask: Mask | None, seed: int, lora: LoraConfig | None = None
) -> nn.Module:
    """`sparse_model` of a model that is already built, in place.

    Args:
        new: parameters that the checkpoint does not hold.

    Raises:
        InputError: as `sparse_model`.
    """
    dense = put_lora(config, model, new, seed, lora)
    mask = Mask({}, {}) if mask is None else _by_new_names(mask, model) if lora is not None else mask
    if mask.k == 0 and not dense:
        raise InputError("found no parameter and an empty mask", "something to train", key="train.always_train")
    return sparsify(model, mask, always_train=[f"^{re.escape(name)}$" for name in dense])


def _by_new_names(mask: Mask, model: nn.Module) -> Mask:
    """The mask by the names that parameters have in a model with an adapter by PEFT, which wraps their layers."""
    names = {name for name, _ in model.named_parameters()}

    def new(name: str) -> str:
        layer, _, kind = name.rpartition(".")
        return name if name in names else f"{layer}.base_layer.{kind}"

    indices = {new(name): index for name, index in mask.indices.items()}
    return Mask(indices, {new(name): shape for name, shape in mask.shapes.items()})


def adapted_model(config: RunConfig, task: Task, adapter: str) -> tuple[Any, list[str]]:
    """The model with an adapter, and the names of the parameters that are not in the base checkpoint.

    A new head that is not in the adapter is initialised by the seed of the adapter's training.

    Raises:
        InputError: as `build_model` and `load_adapter`.
    """
    folder = find_adapter(adapter)
    seed = adapter_seed(folder)
    model, new = build_model(config, task, config.search.seeds[0] if seed is None else seed)
    return load_adapter(model, folder), new
