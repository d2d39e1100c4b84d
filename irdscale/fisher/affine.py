"""Modules whose output is affine in their one vector of weights, entry by entry of the last dimension, such as RMSNorm.

out[..., d] = slope(x)[..., d] * weight[d] + base(x)[..., d], so the gradient of weight[d] is a sum of dY * slope, and
the slope is the module's own output for weights of 1 less that for weights of 0.
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

# Norms compute in float32 inside, whatever their weights.
TOLERANCE = 1e-5

_based: WeakKeyDictionary[nn.Module, bool | None] = WeakKeyDictionary()


def without_hooks(module: nn.Module) -> nn.Module:
    """The module's own computation: neither our hooks nor those that gather its parameters."""
    bare = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith("_hooks"):
            vars(bare)[name] = OrderedDict()
        elif name == "_parameters":
            vars(bare)[name] = dict(value.items())
    return bare


def is_affine(module: nn.Module) -> bool:
    """Whether the module was found to be of this kind: tried once, on random inputs and weights."""
    if module not in _based:
        _based[module] = _try(module)
    return _based[module] is not None


def slope(module: nn.Module, x: Tensor) -> Tensor:
    """d(out) / d(weight) of a module that `is_affine`, in x's shape; of float32 at least."""
    x = wide(x)
    bare = without_hooks(module)
    ones = _with_weights(bare, x, x.new_ones(x.shape[-1]))
    return ones - _with_weights(bare, x, x.new_zeros(x.shape[-1])) if _based[module] else ones


def _try(module: nn.Module) -> bool | None:
    """Whether there is a base, which is not 0; None for a module of another kind."""
    held = [p for p in module._parameters.values() if p is not None]
    if len(held) != 1 or len(shape_of(held[0])) != 1 or next(module.children(), None) is not None:
        return None
    (width,) = shape_of(held[0])
    generator = torch.Generator().manual_seed(0)
    # No other dimension may be taken for the one of the weights.
    shape = (2, 3, width) if width > 3 else (5, 7, width)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(held[0].device)
    weights = torch.randn(2, width, generator=generator, dtype=torch.float64).to(x)
    bare = without_hooks(module)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            base, one = _with_weights(bare, x, torch.zeros_like(weights[0])), _with_weights(bare, x, x.new_ones(width))
            for weight in (weights[0], 10 * weights[1]):
                found, expected = _with_weights(bare, x, weight), base + (one - base) * weight
                # Written so that a NaN is a difference.
                if not float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()):
                    return None
    except Exception:  # A module that takes other inputs fails in its own way.
        return None
    return bool(base.count_nonzero())


def _with_weights(bare: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    (name,) = (name for name, p in bare._parameters.items() if p is not None)
    out: Tensor = functional_call(bare, {name: weight}, (x,))
    if not isinstance(out, Tensor) or out.shape != x.shape:
        raise TypeError("expected an output like the input")
    return out
