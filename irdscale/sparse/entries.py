"""Trainable entries of a parameter: k deltas, and how they are patched into the frozen parameter.

The parameter stays where it is. The k entries are patched into it (base + delta), so no copy of a weight exists; the k
base values are kept, and restore it bit for bit. A quantised parameter is not patched: its dequantised matrix is, for
each use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.distributed.zero3 import gathered_parameters, shape_of
from irdscale.sparse.functions import unlowered
from irdscale.sparse.products import Product, prepare
from irdscale.utils.quantized import dequantized, dtype_of, is_quantized


@dataclass
class Entries:
    """The trainable entries of one parameter, shared by every module that holds it.

    Attributes:
        absolute: whether `values` are effective weights rather than deltas (AdamW then decays weights towards zero).
        patched: whether a forward pass of the whole model is running, which patched the parameter as it started.
        lent: autograd's counts of writes to the parameter and to the values when other code last got the parameter.
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
        """The state of a copy, whose counts of writes start afresh."""
        return {**vars(self), "patched": False, "lent": None}

    @property
    def product(self) -> Product:
        """The product that computes the entries of the gradient; prepared at first use."""
        if self._product is None:
            self._product = prepare(self.index, self.shape)
        return self._product

    @property
    def partitioned(self) -> bool:
        """Whether ZeRO-3 partitions the parameter: each pass gathers a copy that is not patched."""
        return hasattr(self.parameter, "ds_tensor")

    @property
    def quantized(self) -> bool:
        """Whether the parameter holds codes, into which nothing is patched."""
        return is_quantized(self.parameter)

    def follow(self) -> None:
        """Follow the parameter to its device and type, and take over what was written into it since it was lent."""
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
        """Have `follow` take over later writes into the parameter, which must hold the effective weights."""
        self.lent = self._writes()

    def _writes(self) -> tuple[int, int]:
        return self.parameter._version, self.values._version

    def effective(self) -> Tensor:
        """Effective weights at the entries, [k], in the type of `values`."""
        return self.values.detach() if self.absolute else torch.add(self.base, self.values.detach())

    def take(self, weight: Tensor) -> None:
        """Set the values from the effective weights in a full parameter of any type and device."""
        found = weight.detach().view(-1).index_select(0, self.index.to(weight.device).long()).to(self.values)
        self.values.data.copy_(found if self.absolute else found - self.base.to(found))

    def patch(self) -> None:
        """Write the effective weights into the parameter, which must be gathered."""
        patch_all([self])

    def ready(self) -> None:
        """Patch the parameter for a use, unless this pass has patched it."""
        if not self.patched:
            self.patch()

    def restore(self) -> None:
        """Write the base values back into the parameter, which must be gathered."""
        self.follow()
        if not self.quantized:
            _write(self.parameter, self.index.long(), self.base)

    def convert(self, parameter: nn.Parameter, values: Tensor, weights: Tensor) -> None:
        """Follow the parameter after a module converted or replaced it.

        Args:
            parameter: the converted parameter.
            values: the values as the module would convert them; their type is ignored.
            weights: the effective weights before the conversion, [k].
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
            # The effective weights are converted like the parameter's other entries; a lower type may round them.
            found = weights.to(self.values)
            self.values.data.copy_(found if self.absolute else found - self.base.to(found))

    def make_absolute(self, absolute: bool) -> None:
        """Make `values` hold effective weights, or deltas; collective where they are partitioned."""
        if absolute == self.absolute:
            return
        if not self.partitioned:
            self.follow()
        with gathered_parameters([self.values], changed=True), torch.no_grad():
            self.values.data.add_(self.base.to(self.values), alpha=1 if absolute else -1)
        self.absolute = absolute


# Entries patched at once; their new values take about 24 bytes each while they are written.
PATCHED_AT_ONCE = 2**21


def patch_all(entries: Sequence[Entries]) -> None:
    """`Entries.patch` of many gathered parameters; their new values are computed together."""
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
    weights = _cat([one.values.detach() for one in group])
    if not group[0].absolute:
        weights = torch.add(_cat([one.base for one in group]), weights)
    weights = weights.to(group[0].parameter.dtype)
    index = _cat([one.index for one in group]).long()
    sizes = [len(one.index) for one in group]
    for one, own_index, own_weights in zip(group, index.split(sizes), weights.split(sizes), strict=True):
        _write(one.parameter, own_index, own_weights)


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _write(parameter: nn.Parameter, index: Tensor, weights: Tensor) -> None:
    # Through .data: autograd must not count this as a change between forward and backward.
    write_entries(parameter.data.view(-1), index, weights)


def write_entries(flat_N: Tensor, index_k: Tensor, weights_k: Tensor) -> None:
    """Write weights at their indices into a flat tensor."""
    if flat_N.device.type == "cpu" and flat_N.element_size() == 2:
        # On the CPU `scatter_` of 16-bit values takes 20 times as long.
        flat_N.index_copy_(0, index_k, weights_k)
    else:
        flat_N.scatter_(0, index_k, weights_k)


def effective_matrix(weight: nn.Parameter, entries: Entries | None) -> Tensor:
    """A quantised weight's dequantised matrix [O, I] with base + delta at the entries, as a new tensor."""
    matrix = dequantized(weight)
    if entries is not None:
        entries.follow()
        with unlowered(matrix.device.type):
            weights = entries.effective().to(matrix.dtype)
        write_entries(matrix.view(-1), entries.index.long(), weights)
    return matrix


def make_entries(name: str, parameter: nn.Parameter, index: Tensor) -> Entries:
    """Entries at a parameter's sorted flat indices, with deltas of 0 (float32; float64 for a float64 base).

    Collective for a partitioned parameter.
    """
    shape = shape_of(parameter)
    with gathered_parameters([parameter]):
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        index = index.to(parameter.device)
        full = dequantized(parameter) if is_quantized(parameter) else parameter.detach()
        base = full.view(-1).index_select(0, index)
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    values = nn.Parameter(torch.zeros(len(index), dtype=dtype, device=index.device))
    return Entries(name, parameter, values, index, base, shape)
