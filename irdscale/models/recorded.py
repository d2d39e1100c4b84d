"""A record of a model's modules, flags, hooks and configurations, to restore them, with checksums of its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Module:
    """The recorded state of a module.

    Attributes:
        attributes: attributes of the instance by name
        contents: copies of the attributes that are dictionaries, sets or lists, such as hooks and submodules
        buffers: copies of the buffers
    """

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    contents: dict[str, Any]
    buffers: dict[str, Tensor]


class Recorded:
    """A record of a model, to which it is restored after a training.

    Parameters are replaced by new ones of the same data, so that observers of the old ones (a graph, DDP, DeepSpeed) do
    not see the new ones. Changed values are not restored; `same_weights` finds them.
    """

    def __init__(self, model: nn.Module, without: Collection[str] = ()) -> None:
        """Record a model.

        Args:
            without: names of the parameters whose values may change
        """
        copies: dict[int, Tensor] = {}
        self._modules = [_recorded(module, copies) for module in model.modules()]
        self._configs = [(config, dict(vars(config))) for config in _configs(model)]
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        self._model, self._without = model, frozenset(without)
        self._checksums = self._summed()

    def restore(self, values: Mapping[str, Tensor] | None = None) -> bool:
        """Restore everything except the weights; False if a parameter is not the recorded one any more.

        Args:
            values: name -> value that a parameter gets in place of its own, which other models may share
        """
        given, renewed, buffers_of = values or {}, dict[int, nn.Parameter](), dict[int, Tensor]()
        for config, attributes in self._configs:
            _refill(vars(config), attributes)
        for was in self._modules:
            own = vars(was.module)
            parameters, buffers = dict(own["_parameters"]), dict(own["_buffers"])
            object.__setattr__(was.module, "__class__", was.kind)
            _refill(own, was.attributes)
            for name, contents in was.contents.items():
                _refill(own[name], contents)
            for name, recorded in was.contents["_parameters"].items():
                if recorded is None:
                    continue
                found = parameters.get(name)
                if found is not recorded:
                    return False
                if type(found) is not nn.Parameter:
                    # A quantised parameter has more state than its data.
                    renewed[id(found)] = found
                if id(found) not in renewed:
                    full = self._names[id(found)]
                    data = given.get(full, found.data)
                    renewed[id(found)] = nn.Parameter(data, requires_grad=self._required[full])
                was.contents["_parameters"][name] = own["_parameters"][name] = renewed[id(found)]
            for name, value in was.buffers.items():
                if id(value) not in buffers_of:
                    # The model may have moved to another device.
                    device = getattr(buffers.get(name), "device", value.device)
                    buffers_of[id(value)] = value.to(device, copy=True)
                own["_buffers"][name] = buffers_of[id(value)]
        self._names = {id(renewed[old]): name for old, name in self._names.items()}
        return True

    def same_weights(self) -> bool:
        """Whether the parameters have the recorded values, by their checksums."""
        return self._summed() == self._checksums

    def _summed(self) -> list[int]:
        sums = [_checksum(p) for name, p in self._model.named_parameters() if name not in self._without]
        return torch.stack(sums).tolist() if sums else []


def _recorded(module: nn.Module, copies: dict[int, Tensor]) -> _Module:
    """Record a module; a buffer that several modules share is copied once."""
    attributes = dict(vars(module))
    contents = {name: value.copy() for name, value in attributes.items() if isinstance(value, dict | set | list)}
    buffers = {}
    for name, buffer in module._buffers.items():
        if buffer is not None:
            buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    return _Module(module, type(module), attributes, contents, buffers)


def _refill(container: Any, contents: Any) -> None:
    """Replace the contents of a dictionary, set or list."""
    container.clear()
    if isinstance(container, list):
        container.extend(contents)
    else:
        container.update(contents)


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model and its submodules, each once."""
    found: dict[int, Any] = {}
    waiting = [own for module in model.modules() for own in vars(module).values() if _is_config(own)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [part for part in vars(config).values() if _is_config(part)]
    return list(found.values())


def _is_config(value: Any) -> bool:
    from transformers import GenerationConfig, PretrainedConfig

    return isinstance(value, PretrainedConfig | GenerationConfig)


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bytes as 64-bit integers, on its device."""
    bytes_N = tensor.detach().reshape(-1).view(torch.uint8)
    if bytes_N.storage_offset() % 8:
        bytes_N = bytes_N.clone()
    aligned = len(bytes_N) // 8 * 8
    total = bytes_N[:aligned].view(torch.int64).sum()
    return total if aligned == len(bytes_N) else total + bytes_N[aligned:].sum(dtype=torch.int64)
