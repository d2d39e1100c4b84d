"""Modules whose parameters have trainable entries: the same objects and names, of a subclass made for them.

The frozen parameter stays where it is. The k entries are patched into it (base + delta), so there is no copy of a
weight anywhere, and the k base numbers are kept to restore it bit for bit. A forward pass of the whole model patches
all as it starts, in half the time that this takes between the layers' products, which leave nothing else in the caches;
any other use patches what it uses.

Where DeepSpeed ZeRO-3 keeps the parameter in partitions, these hold the base; what is gathered for a forward or a
backward pass is patched each time. The values are partitioned as well: replicated they would take world size times the
room, and a gathering more or less beside their weight's costs nothing.

For whoever reads or writes a state dict, a module holds its effective weights under the base model's names, and no
values. A module converted to another type holds what it computed with, converted; values stay float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irdscale.distributed.zero3 import gathered_parameters, numel_of, shape_of
from irdscale.errors import InputError
from irdscale.models.quantized import dequantizes
from irdscale.sparse.functions import Patched, SparseEmbedding, SparseMatmul, lowered, unlowered, write_numbers
from irdscale.sparse.products import Product, prepare
from irdscale.sparse.quantized import at_each_use
from irdscale.utils.quantized import dequantized, dtype_of, is_quantized

# Has `torch.compile` leave a function out of its graphs, which know neither what is written through `.data` nor which
# pass patched what, and would go on with stale weights. This one imports the compiler late.
outside_graphs = torch._disable_dynamo


@dataclass
class Entries:
    """The trainable entries of one parameter, shared by every module that holds it.

    Attributes:
        absolute: whether `values` are the effective weights themselves, as while AdamW decays them towards zero,
            rather than deltas.
        patched: whether a forward pass of the whole model is under way that patched them as it started.
        lent: counts of writes to the parameter and to the values, by autograd, when somebody last got the parameter.
    """

    name: str
    parameter: nn.Parameter
    values: nn.Parameter
    index: Tensor
    base: Tensor
    shape: tuple[int, ...]
    absolute: bool = False
    patched: bool = False
    lent: tuple[int, int] | None = None
    _product: Product | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which begins to count writes anew."""
        return {**vars(self), "patched": False, "lent": None}

    @property
    def product(self) -> Product:
        """How the entries of a matrix's gradient are computed; prepared when first used."""
        if self._product is None:
            self._product = prepare(self.index, self.shape)
        return self._product

    @property
    def partitioned(self) -> bool:
        """Whether the parameter is gathered anew for each pass, without what was patched into it."""
        return hasattr(self.parameter, "ds_tensor")

    @property
    def quantized(self) -> bool:
        """Whether the parameter holds codes, into which nothing is patched: its matrix is made for each use."""
        return is_quantized(self.parameter)

    def follow(self) -> None:
        """Follow the parameter to its device and type, and take what was written into it since it was lent."""
        device, dtype = self.parameter.device, dtype_of(self.parameter)
        if self.index.device != device:
            self.index, self.base = self.index.to(device), self.base.to(device)
            self._product = None
        if self.base.dtype != dtype:
            self.base = self.base.to(dtype)
        if self.lent is not None:
            was, self.lent = self.lent, self._writes()
            if was[0] != self.lent[0] and was[1] == self.lent[1]:
                self.take(self.parameter)

    def lend(self) -> None:
        """Have what somebody writes into the parameter, which must hold the effective weights, be taken by `follow`."""
        self.lent = self._writes()

    def _writes(self) -> tuple[int, int]:
        return self.parameter._version, self.values._version

    def effective(self) -> Tensor:
        """The weights at the entries, [k], in the type of `values`."""
        return self.values.detach() if self.absolute else torch.add(self.base, self.values.detach())

    def take(self, weight: Tensor) -> None:
        """Set the values by the effective weights that a whole parameter, of any type and device, holds."""
        found = weight.detach().view(-1).index_select(0, self.index.to(weight.device).long()).to(self.values)
        self.values.data.copy_(found if self.absolute else found - self.base.to(found))

    def patch(self) -> None:
        """Write the effective weights into the parameter, which must be whole."""
        patch_all([self])

    def ready(self) -> None:
        """Patch the parameter for a use of it, unless this pass has."""
        if not self.patched:
            self.patch()

    def restore(self) -> None:
        """Write the base numbers back into the parameter, which must be whole."""
        self.follow()
        if not self.quantized:
            _write(self.parameter, self.index.long(), self.base)

    def convert(self, parameter: nn.Parameter, values: Tensor, weights: Tensor) -> None:
        """Follow the parameter, which a module has converted or replaced.

        Args:
            parameter: the converted one.
            values: as the module would convert them; their type does not count.
            weights: the effective weights before, [k].
        """
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        changed = dtype_of(parameter) != self.base.dtype
        kept = values if values.dtype == dtype else self.values.detach().to(values.device, dtype)
        if parameter is self.parameter:
            self.values.data = kept
        else:
            self.parameter = parameter
            self.values = nn.Parameter(kept, requires_grad=self.values.requires_grad)
        if self.values.grad is not None:
            self.values.grad = self.values.grad.to(kept)
        self.lent = None
        self.follow()
        if changed:
            # As the parameter's other entries: what was there, converted. A lower type may round it.
            found = weights.to(self.values)
            self.values.data.copy_(found if self.absolute else found - self.base.to(found))

    def make_absolute(self, absolute: bool) -> None:
        """Have `values` hold the effective weights, or deltas; collective where they are partitioned."""
        if absolute == self.absolute:
            return
        if not self.partitioned:
            self.follow()
        with gathered_parameters([self.values], changed=True), torch.no_grad():
            self.values.data.add_(self.base.to(self.values), alpha=1 if absolute else -1)
        self.absolute = absolute


# Entries that are patched together: what is written into them takes about 24 bytes an entry for that moment.
PATCHED_AT_ONCE = 2**21


def patch_all(entries: Sequence[Entries]) -> None:
    """`Entries.patch` of all, whose parameters must be whole: what is written is computed for many of them at once."""
    alike: dict[tuple[Any, ...], list[Entries]] = {}
    for one in entries:
        one.follow()
        if one.quantized:
            continue
        key = (one.parameter.dtype, one.parameter.device, one.index.dtype, one.values.dtype, one.absolute)
        alike.setdefault(key, []).append(one)
    for group in alike.values():
        start = size = 0
        with unlowered(group[0].parameter.device.type):
            for stop, one in enumerate(group):
                if size and size + len(one.index) > PATCHED_AT_ONCE:
                    _patch_alike(group[start:stop])
                    start, size = stop, 0
                size += len(one.index)
            _patch_alike(group[start:])


def _patch_alike(group: list[Entries]) -> None:
    numbers = _joined([one.values.detach() for one in group])
    if not group[0].absolute:
        numbers = torch.add(_joined([one.base for one in group]), numbers)
    numbers = numbers.to(group[0].parameter.dtype)
    index = _joined([one.index for one in group]).long()
    if len(group) == 1:
        _write(group[0].parameter, index, numbers)
        return
    sizes = [len(one.index) for one in group]
    for one, own_index, own_numbers in zip(group, index.split(sizes), numbers.split(sizes), strict=True):
        _write(one.parameter, own_index, own_numbers)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _write(parameter: nn.Parameter, index: Tensor, numbers: Tensor) -> None:
    # Through .data, for autograd must not count this as a change between forward and backward.
    write_numbers(parameter.data.view(-1), index, numbers)


def make_entries(name: str, parameter: nn.Parameter, index: Tensor) -> Entries:
    """Entries at the sorted flat `index` of a parameter, with deltas of 0 (float32; float64 for a float64 base).

    Collective for a partitioned parameter.
    """
    shape = shape_of(parameter)
    with gathered_parameters([parameter]):
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        index = index.to(parameter.device)
        whole = dequantized(parameter) if is_quantized(parameter) else parameter.detach()
        base = whole.view(-1).index_select(0, index)
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    values = nn.Parameter(torch.zeros(len(index), dtype=dtype, device=index.device))
    return Entries(name, parameter, values, index, base, shape)


def attach(module: nn.Module, local_name: str, entries: Entries) -> None:
    """Give `module` the trainable entries of its parameter `local_name`; the values become `{local_name}_values`."""
    original = type(module)._original if isinstance(module, SparseModule) else type(module)
    held: dict[str, Entries] = {**module.__dict__.get("_sparse", {}), local_name: entries}
    module.__dict__["_sparse"] = held
    module.register_parameter(f"{local_name}_values", entries.values)
    module.__class__ = _subclass(original, tuple(sorted(held)))  # type: ignore[arg-type]


def detach(module: SparseModule) -> None:
    """Make `module` what it was before `attach`; the parameter keeps what it holds now."""
    for local_name in module._sparse:
        del module._parameters[f"{local_name}_values"]
    del module.__dict__["_sparse"]
    object.__setattr__(module, "__class__", type(module)._original)


def attach_all(model: nn.Module, entries: dict[int, Entries]) -> None:
    """Freeze `model`, and attach entries, by their parameter's id, to every module that holds the parameter."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in list(model.modules()):
        for local_name, held in list(module._parameters.items()):
            if held is not None and id(held) in entries:
                attach(module, local_name, entries[id(held)])


def detach_all(model: nn.Module, required_grad: set[str]) -> None:
    """Detach all entries, and have the parameters of these names require gradients, and no others."""
    for module in list(model.modules()):
        if isinstance(module, SparseModule):
            detach(module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in required_grad)


def held_entries(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Entries]]:
    """Each use of trained entries: the parameter's path, the module, its name there, and the entries."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseModule):
            for local_name, entries in module._sparse.items():
                yield f"{path}.{local_name}".lstrip("."), module, local_name, entries


class SparseModule(nn.Module):
    """What the subclasses share. Reading a masked parameter gives its effective value, differentiable in `values`."""

    _original: type[nn.Module]
    _sparse: dict[str, Entries]

    def _values(self) -> dict[str, nn.Parameter]:
        """The values as the module names them."""
        return {f"{local_name}_values": entries.values for local_name, entries in self._sparse.items()}

    def _partitioned(self) -> bool:
        return any(entries.partitioned for entries in self._sparse.values())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The effective weights of this moment; where they are in partitions, what DeepSpeed's checkpoints need."""
        if any(entries.quantized for entries in self._sparse.values()):
            raise _refused("state_dict of a quantised base", "use save_adapter, or merge it first")
        if not self._partitioned():
            patch_all(list(self._sparse.values()))
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._partitioned():
            for name in self._values():
                destination.pop(prefix + name, None)
            for entries in self._sparse.values():
                entries.lend()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take effective weights: the values are what makes them of the base, which stays at the entries."""
        others = state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        if self._partitioned():
            super()._load_from_state_dict(*others)
            return
        if any(entries.quantized for entries in self._sparse.values()):
            raise _refused("load_state_dict of a quantised base", "use load_adapter")
        given = {}
        for local_name, entries in self._sparse.items():
            weight = state_dict.get(prefix + local_name)
            if isinstance(weight, Tensor) and tuple(weight.shape) == entries.shape:
                given[local_name] = weight
                if local_metadata.get("assign_to_params_buffers", False):
                    raise _refused("load_state_dict(assign=True)")
        super()._load_from_state_dict(*others)
        for local_name, entries in self._sparse.items():
            key = f"{prefix}{local_name}_values"
            if key in missing_keys:
                missing_keys.remove(key)
            if key not in state_dict and local_name in given:
                if entries.parameter.element_size() < 4:
                    warnings.warn(_ROUNDED.format(entries.parameter.dtype), stacklevel=2)
                entries.take(given[local_name])
            entries.lent = None
            entries.patch()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._partitioned():
            return super()._apply(fn, recurse)
        before = {name: one.effective().to(dtype_of(one.parameter)) for name, one in self._sparse.items()}
        patch_all(list(self._sparse.values()))
        # Values are converted apart: `Module.half()` would round them.
        values = {name: self._parameters.pop(name) for name in self._values()}
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters.update(values)
        for local_name, entries in self._sparse.items():
            parameter = self._parameters[local_name]
            assert parameter is not None
            own = entries.parameter
            if parameter is not own and (parameter.device, parameter.dtype) == (own.device, own.dtype):
                # It was replaced in another module that holds it, before this one.
                self._parameters[local_name] = entries.parameter
            else:
                entries.convert(parameter, fn(entries.values.detach()), before[local_name])
            self._parameters[f"{local_name}_values"] = entries.values
        return self

    def _replicate_for_data_parallel(self) -> Any:
        raise _refused("DataParallel", "start one process for each GPU, with torchrun, or unload or merge it first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as a module of the original class with these entries; its own class has no name."""
        if not self._partitioned():
            patch_all(list(self._sparse.values()))
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return (_unfilled, (self._original, tuple(sorted(self._sparse))), *reduced[2:])


def _unfilled(original: Any, local_names: tuple[str, ...]) -> nn.Module:
    made = _subclass(original, local_names)
    return made.__new__(made)


def _refused(what: str, instead: str = "unload or merge it first") -> InputError:
    return InputError(f"{what}: not possible for a sparse model; {instead}")


_ROUNDED = (
    "load_state_dict: a sparse model's float32 deltas are set by {} weights, rounded to them; save_adapter and "
    "load_adapter keep the deltas as they are"
)


@outside_graphs
def _effective(module: SparseModule, local_name: str) -> Tensor:
    entries = module._sparse[local_name]
    parameter, values = module._parameters[local_name], entries.values
    assert parameter is not None
    if entries.partitioned and parameter.numel() != numel_of(parameter):
        # Somebody looks at the module while nothing runs.
        return parameter
    entries.ready()
    if values.requires_grad and torch.is_grad_enabled():
        return Patched.apply(parameter, values, entries.index)
    if not entries.partitioned:
        entries.lend()
    return parameter


@outside_graphs
def _matmul_forward(module: Any, x: Tensor) -> Tensor:
    weight, bias = module._sparse.get("weight"), module._sparse.get("bias")
    held = module._parameters["weight"]
    for entries in (weight, bias):
        if entries is not None:
            entries.ready()
    return SparseMatmul.apply(
        lowered(x),
        at_each_use(held, weight) if is_quantized(held) else held,
        module._parameters.get("bias"),
        weight.values if weight else None,
        bias.values if bias else None,
        weight.product if weight else None,
        weight.index if weight else None,
        bias.index if bias else None,
        not isinstance(module, nn.Linear),
        weight.patch if weight and weight.partitioned else None,
    )


@outside_graphs
def _embedding_forward(module: Any, input: Tensor) -> Tensor:
    entries = module._sparse["weight"]
    entries.ready()
    weight = module._parameters["weight"]
    if entries.values.requires_grad and torch.is_grad_enabled():
        return SparseEmbedding.apply(input, weight, entries.values, entries.index, module.padding_idx)
    return F.embedding(input, weight)


@cache
def _subclass(original: type[nn.Module], local_names: tuple[str, ...]) -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    def reader(local_name: str) -> property:
        return property(lambda module: _effective(module, local_name))

    # Codes are read as they are.
    read = [name for name in local_names if name != "weight" or not dequantizes(original)]
    body: dict[str, Any] = {name: reader(name) for name in read}
    body |= {"_original": original, "__module__": original.__module__}
    if original.forward in (nn.Linear.forward, Conv1D.forward) or dequantizes(original):
        body["forward"] = _matmul_forward
    elif original.forward is nn.Embedding.forward:

        def forward(module: Any, input: Tensor) -> Tensor:
            if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
                return nn.Embedding.forward(module, input)
            return _embedding_forward(module, input)

        body["forward"] = forward
    return type(f"Sparse{original.__name__}", (SparseModule, original), body)
