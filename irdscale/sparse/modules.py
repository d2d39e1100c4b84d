"""Modules whose parameters have trainable entries: the same objects and names, of a subclass made for them.

A forward pass of the whole model patches all parameters as it starts. That takes half the time of patching each one
between the layers' products, which leave no weights in the caches; any other use patches the parameters that it reads.

Under DeepSpeed ZeRO-3 the partitions hold the base, and each gathered copy is patched, in the forward and again in the
backward pass. The values are partitioned too: replicated they would take world size times the memory, and gathering
them with their weight costs nothing.

A state dict holds the effective weights under the base model's names, and no values. A module converted to another
type holds its effective weights, converted; values stay float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irdscale.distributed.zero3 import numel_of
from irdscale.errors import InputError
from irdscale.models.quantized import dequantizes
from irdscale.sparse.entries import Entries, effective_matrix, patch_all
from irdscale.sparse.functions import Patched, SparseEmbedding, SparseMatmul, lowered
from irdscale.utils.quantized import dtype_of, is_quantized

# Excludes a function from the graphs of `torch.compile`: they do not see writes through `.data`, and would use stale
# weights. This private function imports the compiler late.
outside_graphs = torch._disable_dynamo


def attach(module: nn.Module, local_name: str, entries: Entries) -> None:
    """Give `module` the trainable entries of its parameter `local_name`; the values become `{local_name}_values`."""
    original = type(module)._original if isinstance(module, SparseModule) else type(module)
    held: dict[str, Entries] = {**module.__dict__.get("_sparse", {}), local_name: entries}
    module.__dict__["_sparse"] = held
    module.register_parameter(f"{local_name}_values", entries.values)
    module.__class__ = _subclass(original, tuple(sorted(held)))  # type: ignore[arg-type]


def detach(module: SparseModule) -> None:
    """Undo `attach`; the parameter keeps its present contents."""
    for local_name in module._sparse:
        del module._parameters[f"{local_name}_values"]
    del module.__dict__["_sparse"]
    object.__setattr__(module, "__class__", type(module)._original)


def attach_all(model: nn.Module, entries: dict[int, Entries]) -> None:
    """Freeze `model`, and attach entries, given by their parameter's id, to every module that holds the parameter."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in list(model.modules()):
        for local_name, held in list(module._parameters.items()):
            if held is not None and id(held) in entries:
                attach(module, local_name, entries[id(held)])


def detach_all(model: nn.Module, required_grad: set[str]) -> None:
    """Detach all entries, and make exactly the parameters of these names require gradients."""
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
    """Base of the subclasses. Reading a masked parameter gives its effective value, differentiable in `values`."""

    _original: type[nn.Module]
    _sparse: dict[str, Entries]

    def _values(self) -> dict[str, nn.Parameter]:
        """The values by their names in the module."""
        return {f"{local_name}_values": entries.values for local_name, entries in self._sparse.items()}

    def _partitioned(self) -> bool:
        return any(entries.partitioned for entries in self._sparse.values())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the effective weights; of partitioned parameters, what DeepSpeed's checkpoints need."""
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
        """Load effective weights: the values become their difference from the base, which stays."""
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
        # Values are converted separately: `Module.half()` would round them.
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
                # Another module that holds the parameter was converted first, and replaced it.
                self._parameters[local_name] = entries.parameter
            else:
                entries.convert(parameter, fn(entries.values.detach()), before[local_name])
            self._parameters[f"{local_name}_values"] = entries.values
        return self

    def _replicate_for_data_parallel(self) -> Any:
        raise _refused("DataParallel", "start one process for each GPU, with torchrun, or unload or merge it first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as the original class with these entries: the subclass cannot be imported."""
        if not self._partitioned():
            patch_all(list(self._sparse.values()))
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return (_unfilled, (self._original, tuple(sorted(self._sparse))), *reduced[2:])


def _unfilled(original: Any, local_names: tuple[str, ...]) -> nn.Module:
    made = _subclass(original, local_names)
    return made.__new__(made)


def _refused(what: str, instead: str = "unload or merge it first") -> InputError:
    return InputError(f"not possible for a sparse model; {instead}", key=what)


_ROUNDED = (
    "load_state_dict: found {} weights, which round a sparse model's float32 deltas; expected float32 weights, or "
    "save_adapter and load_adapter, which keep the deltas exact"
)


@outside_graphs
def _effective(module: SparseModule, local_name: str) -> Tensor:
    entries = module._sparse[local_name]
    parameter, values = module._parameters[local_name], entries.values
    assert parameter is not None
    if entries.partitioned and parameter.numel() != numel_of(parameter):
        # The parameter is read while no pass runs.
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
        partial(effective_matrix, held, weight) if is_quantized(held) else held,
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

    # The codes of a quantised weight are read unchanged.
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
