"""Make a model sparse, with k trainable deltas on a frozen base, and undo it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from irdscale.distributed.zero3 import gathered_parameters, numel_of, shape_of
from irdscale.errors import InputError
from irdscale.masks.mask import Mask, index_dtype
from irdscale.models.quantized import adopt, make_plain, refuse_quantized
from irdscale.sparse.entries import Entries, effective_matrix, make_entries, patch_all
from irdscale.sparse.guards import guard, unguard
from irdscale.sparse.modules import attach_all, detach_all, outside_graphs
from irdscale.utils.quantized import any_quantized, is_quantized, parts_of
from irdscale.utils.suggestions import nearest

# Attribute of a model with the hashes of its base, from `irdscale.adapters.base.vouch`.
VOUCHED = "_irdscale_vouched"


@dataclass
class SparseState:
    """What `sparsify` did to a model.

    Attributes:
        mask: the entries that are trained.
        entries: name -> the trainable entries of that parameter.
        dense: name -> base value of each densely trained parameter.
        masters: name -> float32 master weights of each densely trained parameter of lower precision.
        required_grad: names of the parameters that required gradients before.
        hooks: hooks that patch all parameters as a forward pass starts.
        known_bases: hashes of the base that `irdscale.adapters.base` caches.
        head_before: the configuration's values about classes before an adapter was loaded.
    """

    mask: Mask
    entries: dict[str, Entries]
    dense: dict[str, Tensor]
    masters: dict[str, Entries]
    required_grad: set[str]
    hooks: list[RemovableHandle] = field(default_factory=list)
    known_bases: dict[frozenset[str], tuple[Any, str]] = field(default_factory=dict)
    head_before: dict[str, Any] = field(default_factory=dict)

    @property
    def k(self) -> int:
        """Number of masked entries."""
        return self.mask.k

    @property
    def dense_parameters(self) -> int:
        """Number of densely trained parameters, by `always_train`."""
        return sum(base.numel() for base in self.dense.values())

    @property
    def patched(self) -> list[Entries]:
        """All entries that are patched into frozen parameters."""
        return [*self.entries.values(), *self.masters.values()]


def is_sparse(model: nn.Module) -> bool:
    """Whether `sparsify` or `load_adapter` was applied to the model."""
    return isinstance(getattr(model, "_irdscale", None), SparseState)


def sparse_state(model: nn.Module) -> SparseState:
    """What `sparsify` did to this model.

    Raises:
        InputError: the model is not sparse.
    """
    if not is_sparse(model):
        raise InputError("not a sparse model", "one from sparsify or load_adapter", where=type(model).__name__)
    return cast(SparseState, model._irdscale)


def matching_parameters(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Parameter names that one of the regular expressions matches (`re.search`); each must match a name.

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
                f"found {pattern!r}", f"a regular expression ({error})", key="train.always_train"
            ) from None
        if not found:
            raise InputError(f"{pattern!r} matches no parameter{nearest(pattern, names)}", key="train.always_train")
        matched.update(found)
    return [name for name in names if name in matched]


def sparsify(model: nn.Module, mask: Mask, always_train: Sequence[str] = ()) -> nn.Module:
    """Make the entries of `mask` the only trainable parameters of `model`, in place.

    The base weights are frozen; each module that holds masked entries gets a parameter `{name}_values` of the
    float32 deltas, which start at 0. Parameters that match `always_train` are trained densely, outside the mask, with
    float32 master weights if the model has a lower precision. Collective for a model in ZeRO-3 partitions. A base that
    bitsandbytes has quantised stays quantised: its matrices are dequantised and patched for each product.

    Args:
        model: any module; tied and repeatedly used parameters are allowed.
        mask: indices by the names of `model.named_parameters()`.
        always_train: regular expressions of parameter names, such as a new classification head's.

    Raises:
        InputError: the model is sparse already, the mask does not fit it, or `always_train` names masked entries.
    """
    if is_sparse(model):
        raise InputError("sparse already; unload or merge it first", where=type(model).__name__)
    parameters = dict(model.named_parameters())
    mask.check()
    dense = matching_parameters(parameters, always_train)
    refuse_quantized(model, dense, "train.always_train")
    adopt(model)
    for name, index in mask.indices.items():
        if name not in parameters:
            raise InputError(f"{name}: the model has no such parameter{nearest(name, parameters)}", key="mask")
        if shape_of(parameters[name]) != tuple(mask.shapes[name]):
            found, expected = tuple(mask.shapes[name]), shape_of(parameters[name])
            raise InputError(f"{name}: found shape {found}", f"{expected}, the model's", key="mask")
        if name in dense and len(index):
            raise InputError(f"{name}: found entries in a parameter that train.always_train trains densely", key="mask")
    required_grad = {name for name, p in parameters.items() if p.requires_grad}
    # In the model's order: a computed mask and the same one loaded from disk have different orders.
    masked = [name for name in parameters if len(mask.indices.get(name, ()))]
    entries = {name: make_entries(name, parameters[name], mask.indices[name]) for name in masked}
    copies, masters = {}, {}
    for name in dense:
        parameter = parameters[name]
        with gathered_parameters([parameter]):
            copies[name] = parameter.detach().clone()
        if parameter.dtype in (torch.bfloat16, torch.float16):
            masters[name] = make_entries(
                name, parameter, torch.arange(numel_of(parameter), dtype=index_dtype(numel_of(parameter)))
            )
            masters[name].make_absolute(True)
    attach_all(model, {id(parameters[name]): e for name, e in (entries | masters).items()})
    for name in dense:
        parameters[name].requires_grad_(name not in masters)
    hooks = [model.register_forward_pre_hook(_start_pass), model.register_forward_hook(_end_pass, always_call=True)]
    known = dict(vars(model).get(VOUCHED, {}))
    model._irdscale = SparseState(mask, entries, copies, masters, required_grad, hooks, known)  # type: ignore[assignment]
    guard(model, [parameters[name] for name in dense])
    return model


@outside_graphs
def _start_pass(model: nn.Module, _args: Any) -> None:
    unpartitioned = [entries for entries in sparse_state(model).patched if not entries.partitioned]
    patch_all(unpartitioned)
    for entries in unpartitioned:
        entries.patched = True


@outside_graphs
def _end_pass(model: nn.Module, _args: Any, _output: Any) -> None:
    for entries in sparse_state(model).patched:
        entries.patched = False


def _strip(model: nn.Module) -> None:
    state = sparse_state(model)
    detach_all(model, state.required_grad)
    for hook in state.hooks:
        hook.remove()
    unguard(model)
    del model._irdscale
    for parameter in model.parameters():
        parameter.grad = None


def merge(model: nn.Module, dequantize: bool = True) -> nn.Module:
    """A plain model again, in place, with the deltas added to its weights. Collective for a model in partitions.

    Args:
        dequantize: whether a quantised base is dequantised, layer by layer; False leaves it quantised, which is
            possible if no quantised weight has trained entries.

    Raises:
        InputError: the model is not sparse, or its entries cannot be added to quantised weights.
    """
    patched = sparse_state(model).patched
    held = {id(entries.parameter): entries for entries in patched if entries.quantized}
    if held and not dequantize:
        name = next(iter(held.values())).name
        raise InputError(f"found trained entries in the quantised weight {name}", "merge(model)", key="dequantize")
    for entries in patched:
        with gathered_parameters([entries.parameter, entries.values], changed=True):
            entries.patch()
    _strip(model)
    if dequantize and any_quantized(model):
        make_plain(model, lambda weight: effective_matrix(weight, held.get(id(weight))))
    return model


def unload(model: nn.Module) -> nn.Module:
    """The base model again, in place, bit for bit, densely trained parameters included.

    Raises:
        InputError: the model is not sparse.
    """
    state = sparse_state(model)
    for entries in state.patched:
        with gathered_parameters([entries.parameter], changed=True):
            entries.restore()
    parameters = dict(model.named_parameters())
    for name, base in state.dense.items():
        with gathered_parameters([parameters[name]], changed=True):
            parameters[name].data.copy_(base)
    for key, value in state.head_before.items():
        setattr(model.config, key, value)
    _strip(model)
    return model


def hash_tensor(sha: Any, name: str, tensor: Tensor) -> None:
    """Feed a tensor's name, shape, type and bytes to a hash."""
    tensor = tensor.detach().cpu().contiguous()
    sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def base_hash(model: nn.Module, without: Iterable[str] | None = None) -> str:
    """SHA-256 of the frozen base: names, shapes, types and bytes of all parameters that are not trained densely.

    Collective for a model in partitions; one parameter is gathered at a time.

    Args:
        without: names of the excluded parameters; by default the densely trained ones.
    """
    state = sparse_state(model)
    left_out = set(state.dense if without is None else without)
    values = {id(entries.values) for entries in state.patched}
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name in left_out or id(parameter) in values:
            continue
        if name in state.dense:
            hash_tensor(sha, name, state.dense[name])
            continue
        if is_quantized(parameter):
            for part, tensor in parts_of(parameter).items():
                hash_tensor(sha, f"{name}{part}", tensor)
            continue
        with _base_of(parameter, state.entries.get(name)):
            hash_tensor(sha, name, parameter)
    return sha.hexdigest()


@contextmanager
def _base_of(parameter: nn.Parameter, entries: Entries | None) -> Iterator[None]:
    """In the body, the parameter is gathered and holds the base."""
    with gathered_parameters([parameter] if entries is None else [parameter, entries.values]):
        if entries is None:
            yield
            return
        entries.restore()
        try:
            yield
        finally:
            entries.patch()


def trained_on(model: nn.Module) -> dict[str, str]:
    """Hashes that identify this sparse model without reading the full base: its mask, and the base at its entries."""
    state = sparse_state(model)
    sha = hashlib.sha256()
    for name in sorted(state.entries):
        hash_tensor(sha, name, state.entries[name].base)
    return {"mask": state.mask.hash, "base": sha.hexdigest(), "whole": " ".join(sorted(state.dense))}


def trained_numbers(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Deltas and densely trained parameters of a sparse model, each by parameter name, on the CPU.

    Collective for a model in partitions: every rank gets all of them.
    """
    state = sparse_state(model)
    parameters = dict(model.named_parameters())
    deltas, dense = {}, {}
    for entries in state.patched:
        if not entries.partitioned:
            entries.follow()
    for name, entries in state.entries.items():
        with gathered_parameters([entries.values]):
            delta = entries.effective() - entries.base if entries.absolute else entries.values.detach()
            deltas[name] = delta.cpu().clone()
    for name in state.dense:
        source = state.masters[name].values if name in state.masters else parameters[name]
        with gathered_parameters([source]):
            dense[name] = source.detach().to(parameters[name].dtype).view(shape_of(parameters[name])).cpu().clone()
    return deltas, dense


def dense_beside_mask(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer trains beside the masked entries; none for a model without entries."""
    state, parameters = sparse_state(model), dict(model.named_parameters())
    if not state.entries:
        return []
    return [state.masters[name].values if name in state.masters else parameters[name] for name in state.dense]


def entries_of(model: nn.Module) -> dict[str, Entries]:
    """name -> trainable entries (`values`, `base`, `index`) of each masked parameter."""
    return sparse_state(model).entries


def set_trained_numbers(model: nn.Module, deltas: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    """Load what `trained_numbers` returned for a model with the same mask; collective likewise."""
    state = sparse_state(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, entries in state.entries.items():
            with gathered_parameters([entries.values], changed=True):
                entries.values.data.copy_(deltas[name])
                if not entries.partitioned:
                    entries.patch()
        for name in state.dense:
            target = state.masters[name].values if name in state.masters else parameters[name]
            with gathered_parameters([target], changed=True):
                target.data.copy_(dense[name].view(target.shape))
            if name in state.masters and not state.masters[name].partitioned:
                state.masters[name].patch()
