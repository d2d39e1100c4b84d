"""Modules whose output is affine in their only weight vector, entry by entry of the last dimension, such as RMSNorm.

out[..., d] = slope(x)[..., d] * weight[d] + base(x)[..., d]. The gradient of weight[d] is a sum of dY * slope, and the
slope is the module's output for weights of 1 minus its output for weights of 0.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from irdscale.distributed.zero3 import shape_of
from irdscale.fisher.terms import wide

# Norms compute in float32 whatever the data type of their weights.
TOLERANCE = 1e-5

# Whether each module has a base other than 0; None if it is not affine.
_has_base: WeakKeyDictionary[nn.Module, bool | None] = WeakKeyDictionary()


def without_hooks(module: nn.Module) -> nn.Module:
    """A copy of the module without hooks, neither ours nor those that gather its parameters."""
    bare = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith("_hooks"):
            vars(bare)[name] = OrderedDict()
        elif name == "_parameters":
            vars(bare)[name] = dict(value.items())
    return bare


def is_affine(module: nn.Module) -> bool:
    """Whether the module is affine in its weights, by one test on random inputs and weights."""
    if module not in _has_base:
        probe(module, module)
    return _has_base[module] is not None


def probe(module: nn.Module, like: nn.Module) -> None:
    """Test a module by another one of the same kind, such as a copy off the meta device."""
    _has_base[module] = _find_base(like)


def slope(module: nn.Module, x: Tensor) -> Tensor:
    """d(out) / d(weight) of an affine module, in x's shape, in float32 at least."""
    x = wide(x)
    bare = without_hooks(module)
    ones = _with_weights(bare, x, x.new_ones(x.shape[-1]))
    return ones - _with_weights(bare, x, x.new_zeros(x.shape[-1])) if _has_base[module] else ones


def _find_base(module: nn.Module) -> bool | None:
    """Whether the base is not 0; None if the module is not affine."""
    held = [p for p in module._parameters.values() if p is not None]
    if len(held) != 1 or len(shape_of(held[0])) != 1 or next(module.children(), None) is not None:
        return None
    (width,) = shape_of(held[0])
    generator = torch.Generator().manual_seed(0)
    # No other dimension may equal that of the weights.
    shape = (2, 3, width) if width > 3 else (5, 7, width)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(held[0].device)
    weights = torch.randn(2, width, generator=generator, dtype=torch.float64).to(x)
    bare = without_hooks(module)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            base, one = _with_weights(bare, x, torch.zeros_like(weights[0])), _with_weights(bare, x, x.new_ones(width))
            for weight in (weights[0], 10 * weights[1]):
                found, expected = _with_weights(bare, x, weight), base + (one - base) * weight
                # A NaN counts as a difference.
                if not float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()):
                    return None
    except Exception:  # a module with other inputs may raise errors of any class
        return None
    return bool(base.count_nonzero())


def _with_weights(bare: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    (name,) = (name for name, p in bare._parameters.items() if p is not None)
    out: Tensor = functional_call(bare, {name: weight}, (x,))
    if not isinstance(out, Tensor) or out.shape != x.shape:
        raise TypeError("expected an output like the input")
    return out
