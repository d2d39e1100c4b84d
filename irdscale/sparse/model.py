"""Turn a model into the same model with k trainable numbers, and back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from irdscale.config import nearest
from irdscale.errors import InputError
from irdscale.mask import Mask
from irdscale.sparse.modules import Entries, SparseModule, attach, detach, make_entries


@dataclass
class SparseState:
    """What `sparsify` did to a model.

    Attributes:
        mask: the entries that are trained.
        entries: name -> the trainable entries of that parameter.
        dense: name -> the base value of each parameter that is trained whole.
        required_grad: parameter names that required gradients before.
        known_bases: what `irdscale.sparse.switch` remembers of the base's hashes.
    """

    mask: Mask
    entries: dict[str, Entries]
    dense: dict[str, Tensor]
    required_grad: set[str]
    known_bases: dict[frozenset[str], tuple[Any, str]] = field(default_factory=dict)

    @property
    def k(self) -> int:
        """Trained entries of the mask."""
        return self.mask.k

    @property
    def dense_parameters(self) -> int:
        """Numbers trained outside the mask, by `always_train`."""
        return sum(base.numel() for base in self.dense.values())


def is_sparse(model: nn.Module) -> bool:
    """Whether `sparsify` or `load_adapter` was applied to the model."""
    return isinstance(getattr(model, "_irdscale", None), SparseState)


def sparse_state(model: nn.Module) -> SparseState:
    """What `sparsify` did to this model.

    Raises:
        InputError: the model is not sparse.
    """
    if not is_sparse(model):
        raise InputError(f"{type(model).__name__}: not a sparse model; expected one from sparsify or load_adapter")
    return cast(SparseState, model._irdscale)


def matching_parameters(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Parameter names in which one of the regular expressions is found; each must be found somewhere.

    Raises:
        InputError: an expression is malformed or matches nothing.
    """
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        try:
            found = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise InputError(
                f"train.always_train: found {pattern!r}; expected a regular expression ({error})"
            ) from None
        if not found:
            raise InputError(f"train.always_train: {pattern!r} matches no parameter{nearest(pattern, names)}")
        matched.update(found)
    return [name for name in names if name in matched]


def sparsify(model: nn.Module, mask: Mask, always_train: Sequence[str] = ()) -> nn.Module:
    """Make the entries of `mask` the only trainable numbers of `model`, in place.

    The base weights stay, frozen; each module that holds masked entries gets a parameter `{name}_values` of the
    float32 deltas, which start at 0. Parameters that match `always_train` are trained whole, outside the mask.

    Args:
        model: any module; tied parameters and parameters used more than once are covered.
        mask: indices by the names of `model.named_parameters()`.
        always_train: regular expressions, searched in parameter names, such as a new classification head's.

    Raises:
        InputError: the model is sparse already, the mask does not fit it, or `always_train` names masked entries.
    """
    if is_sparse(model):
        raise InputError(f"{type(model).__name__}: sparse already; unload or merge it first")
    parameters = dict(model.named_parameters())
    mask.check()
    dense = matching_parameters(parameters, always_train)
    for name, index in mask.indices.items():
        if name not in parameters:
            raise InputError(f"mask: {name}: the model has no such parameter{nearest(name, parameters)}")
        if tuple(parameters[name].shape) != tuple(mask.shapes[name]):
            found, expected = tuple(mask.shapes[name]), tuple(parameters[name].shape)
            raise InputError(f"mask: {name}: found shape {found}; expected {expected}, the model's")
        if name in dense and len(index):
            raise InputError(f"mask: {name}: found entries in a parameter that train.always_train trains whole")
    required_grad = {name for name, p in parameters.items() if p.requires_grad}
    entries = {name: make_entries(name, parameters[name], index) for name, index in mask.indices.items() if len(index)}
    by_parameter = {id(parameters[name]): e for name, e in entries.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for module in list(model.modules()):
        for local_name, held in list(module._parameters.items()):
            if held is not None and id(held) in by_parameter:
                attach(module, local_name, by_parameter[id(held)])
    for name in dense:
        parameters[name].requires_grad_(True)
    copies = {name: parameters[name].detach().clone() for name in dense}
    model._irdscale = SparseState(mask, entries, copies, required_grad)  # type: ignore[assignment]
    return model


def _strip(model: nn.Module) -> None:
    state = sparse_state(model)
    for module in list(model.modules()):
        if isinstance(module, SparseModule):
            detach(module)
    del model._irdscale
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.required_grad)
        parameter.grad = None


def merge(model: nn.Module) -> nn.Module:
    """A plain model again, in place, with the deltas added to its weights.

    Raises:
        InputError: the model is not sparse.
    """
    for entries in sparse_state(model).entries.values():
        entries.patch()
    _strip(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """The base model again, in place, bit for bit, parameters trained by `always_train` included.

    Raises:
        InputError: the model is not sparse.
    """
    state = sparse_state(model)
    for entries in state.entries.values():
        entries.restore()
    parameters = dict(model.named_parameters())
    for name, base in state.dense.items():
        parameters[name].data.copy_(base)
    _strip(model)
    return model


def hash_tensor(sha: Any, name: str, tensor: Tensor) -> None:
    """Feed a tensor's name, shape, type and bytes to a hash."""
    tensor = tensor.detach().cpu().contiguous()
    sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def base_hash(model: nn.Module, without: Iterable[str] | None = None) -> str:
    """SHA-256 over the frozen base: names, shapes, types and bytes of all parameters that are not trained whole.

    Args:
        without: the parameters to leave out, by name; those that are trained whole unless given.
    """
    state = sparse_state(model)
    left_out = set(state.dense if without is None else without)
    values = {id(entries.values) for entries in state.entries.values()}
    for entries in state.entries.values():
        entries.restore()
    try:
        sha = hashlib.sha256()
        for name, parameter in model.named_parameters():
            if name not in left_out and id(parameter) not in values:
                hash_tensor(sha, name, state.dense.get(name, parameter))
        return sha.hexdigest()
    finally:
        for entries in state.entries.values():
            entries.patch()


def trained_numbers(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The deltas by parameter name, and the parameters that are trained whole by name: copies on the CPU.

    Raises:
        InputError: the model is not sparse.
    """
    state = sparse_state(model)
    parameters = dict(model.named_parameters())
    deltas = {name: entries.values.detach().to("cpu", copy=True) for name, entries in state.entries.items()}
    return deltas, {name: parameters[name].detach().to("cpu", copy=True) for name in state.dense}


def entries_of(model: nn.Module) -> dict[str, Entries]:
    """name -> trainable entries (`values`, `base`, `index`) of each masked parameter."""
    return sparse_state(model).entries
