"""Turn a model into the same model with k trainable numbers, and back."""

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

from irdscale.config.schema import nearest
from irdscale.distributed.zero3 import gathered_parameters, numel_of, shape_of
from irdscale.errors import InputError
from irdscale.masks.mask import Mask, index_dtype
from irdscale.models.quantized import adopt, make_plain, refuse_quantized
from irdscale.sparse.guards import guard, unguard
from irdscale.sparse.modules import Entries, attach_all, detach_all, make_entries, outside_graphs, patch_all
from irdscale.sparse.quantized import effective_matrix
from irdscale.utils.quantized import any_quantized, is_quantized, parts_of

# Where a model keeps the hashes of its base that `irdscale.adapters.base.vouch` was given.
VOUCHED = "_irdscale_vouched"


@dataclass
class SparseState:
    """What `sparsify` did to a model.

    Attributes:
        mask: the entries that are trained.
        entries: name -> the trainable entries of that parameter.
        dense: name -> the base value of each parameter that is trained whole.
        masters: name -> float32 numbers that are trained in place of such a parameter of a lower precision.
        required_grad: parameter names that required gradients before.
        hooks: those that patch everything as a forward pass starts.
        known_bases: what `irdscale.adapters.base` remembers of the base's hashes.
        head_before: values of the model's configuration about its classes before an adapter was put on.
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
        """Trained entries of the mask."""
        return self.mask.k

    @property
    def dense_parameters(self) -> int:
        """Numbers trained outside the mask, by `always_train`."""
        return sum(base.numel() for base in self.dense.values())

    @property
    def patched(self) -> list[Entries]:
        """Everything that is written into a frozen parameter at its use."""
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
    float32 deltas, which start at 0. Parameters that match `always_train` are trained whole, outside the mask, by
    float32 numbers too where the model is of a lower precision. Collective for a model in ZeRO-3 partitions. A base
    that bitsandbytes has quantised stays so: its matrices are dequantised, and patched, for each product.

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
    refuse_quantized(model, dense, "train.always_train")
    adopt(model)
    for name, index in mask.indices.items():
        if name not in parameters:
            raise InputError(f"mask: {name}: the model has no such parameter{nearest(name, parameters)}")
        if shape_of(parameters[name]) != tuple(mask.shapes[name]):
            found, expected = tuple(mask.shapes[name]), shape_of(parameters[name])
            raise InputError(f"mask: {name}: found shape {found}; expected {expected}, the model's")
        if name in dense and len(index):
            raise InputError(f"mask: {name}: found entries in a parameter that train.always_train trains whole")
    required_grad = {name for name, p in parameters.items() if p.requires_grad}
    # In the model's order, whatever the mask's: a mask that was just made and the same one loaded differ in it.
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
    whole_ones = [entries for entries in sparse_state(model).patched if not entries.partitioned]
    patch_all(whole_ones)
    for entries in whole_ones:
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
        dequantize: a quantised base becomes one of its float type, layer by layer; False leaves it as it is, where no
            quantised weight has trained entries.

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
    """The base model again, in place, bit for bit, parameters trained by `always_train` included.

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
    """SHA-256 over the frozen base: names, shapes, types and bytes of all parameters that are not trained whole.

    Collective for a model in partitions; one parameter is gathered at a time.

    Args:
        without: the parameters to leave out, by name; those that are trained whole unless given.
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
    """The parameter whole, and without its deltas."""
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
    """What tells this sparse model from others, short of reading the whole base: its mask, and the base there."""
    state = sparse_state(model)
    sha = hashlib.sha256()
    for name in sorted(state.entries):
        hash_tensor(sha, name, state.entries[name].base)
    return {"mask": state.mask.hash, "base": sha.hexdigest(), "whole": " ".join(sorted(state.dense))}


def trained_numbers(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a sparse model learned, on the CPU: the deltas by parameter name, and the parameters trained whole.

    Collective for a model in partitions: every rank gets all of it.
    """
    state = sparse_state(model)
    parameters = dict(model.named_parameters())
    deltas, dense = {}, {}
    for entries in state.patched:
        if not entries.partitioned:
            entries.follow()
    for name, entries in state.entries.items():
        with gathered_parameters([entries.values]):
            deltas[name] = (entries.effective() - entries.base if entries.absolute else entries.values.detach()).cpu()
            deltas[name] = deltas[name].clone()
    for name in state.dense:
        source = state.masters[name].values if name in state.masters else parameters[name]
        with gathered_parameters([source]):
            dense[name] = source.detach().to(parameters[name].dtype).view(shape_of(parameters[name])).cpu().clone()
    return deltas, dense


def entries_of(model: nn.Module) -> dict[str, Entries]:
    """name -> trainable entries (`values`, `base`, `index`) of each masked parameter."""
    return sparse_state(model).entries


def set_trained_numbers(model: nn.Module, deltas: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    """Give a sparse model what `trained_numbers` read of one with the same mask; collective as that is."""
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
