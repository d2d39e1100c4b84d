"""Rules that turn one call of a module into terms of its parameters' per-sample gradients, by the module's type.

A rule reads what the module saw (X) and the gradient of its output (dY), and returns one term for each of the module's
own scored parameters. The terms of a parameter are summed over all its calls, as of tied weights and of layers that
run twice, before they are squared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from irdscale.distributed.zero3 import gathered_parameters
from irdscale.fisher.affine import is_affine, slope, without_hooks
from irdscale.fisher.terms import Dense, Outer, TableRows, Term
from irdscale.models.quantized import dequantizes


@dataclass
class ModuleCall:
    """One call of a module.

    Attributes:
        args, kwargs: its inputs
        batch: number of samples B
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int

    @property
    def x(self) -> Tensor:
        """The first tensor among the inputs."""
        return next(value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))


Rule = Callable[[ModuleCall, Tensor, set[str]], dict[str, Term]]


def _expanded(x: Tensor, batch: int) -> Tensor:
    """[1, ...], computed once for all samples, as [B, ...]."""
    return x.expand(batch, *x.shape[1:]) if batch > 1 and x.shape[0] == 1 else x


def _samples(x: Tensor, batch: int) -> Tensor:
    """[B, ..., D], [1, ..., D] or [B T, D] (the samples' tokens one after the other) as [B, T, D]."""
    return _expanded(x, batch).reshape(batch, -1, x.shape[-1])


def _matrix_product(call: ModuleCall, dy: Tensor, wanted: set[str], *, output_first: bool) -> dict[str, Term]:
    dy_BTO = _samples(dy, call.batch)
    terms: dict[str, Term] = {}
    if "weight" in wanted:
        x_BTI = _samples(call.x, call.batch)
        terms["weight"] = Outer(dy_BTO, x_BTI) if output_first else Outer(x_BTI, dy_BTO)
    if "bias" in wanted:
        terms["bias"] = Dense(dy_BTO.sum(1))
    return terms


# Conv1D keeps its weight as [I, O].
_linear = partial(_matrix_product, output_first=True)
_conv1d = partial(_matrix_product, output_first=False)


def _embedding(call: ModuleCall, dy: Tensor, wanted: set[str]) -> dict[str, Term]:
    ids_BT, grad_BTD = _expanded(call.x, call.batch).reshape(call.batch, -1), _samples(dy, call.batch)
    padding = cast(nn.Embedding, call.module).padding_idx
    if padding is not None:
        # nn.Embedding computes no gradient for its padding row.
        grad_BTD = grad_BTD.masked_fill(ids_BT.eq(padding).unsqueeze(2), 0)
    return {"weight": TableRows(ids_BT, grad_BTD)}


def _layer_norm(call: ModuleCall, dy: Tensor, wanted: set[str]) -> dict[str, Term]:
    module = cast(nn.LayerNorm, call.module)
    shape = tuple(module.normalized_shape)
    normal = F.layer_norm(call.x, shape, None, None, module.eps)
    terms: dict[str, Term] = {}
    if "weight" in wanted:
        terms["weight"] = Dense((dy * normal).reshape(call.batch, -1, *shape).sum(1))
    if "bias" in wanted:
        terms["bias"] = Dense(dy.reshape(call.batch, -1, *shape).sum(1))
    return terms


def _affine(call: ModuleCall, dy: Tensor, wanted: set[str]) -> dict[str, Term]:
    if len(call.args) + len(call.kwargs) != 1:
        return _generic(call, dy, wanted)
    (name,) = wanted
    return {name: Dense(_samples(dy * slope(call.module, call.x), call.batch).sum(1))}


def _generic(call: ModuleCall, dy: Tensor, wanted: set[str]) -> dict[str, Term]:
    """The vector-Jacobian product of the module alone, vmapped over samples."""
    module, batch, count = without_hooks(call.module), call.batch, len(call.args)
    values = [*call.args, *call.kwargs.values()]
    dims = [0 if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] in (batch, 1) else None for v in values]
    inputs = [v if dim is None else v.detach().expand(batch, *v.shape[1:]) for v, dim in zip(values, dims, strict=True)]

    def local(dy_sample: Tensor, *values: Any) -> dict[str, Tensor]:
        own = [v if dim is None else v.unsqueeze(0) for v, dim in zip(values, dims, strict=True)]
        args, kwargs = tuple(own[:count]), dict(zip(call.kwargs, own[count:], strict=True))
        pull = vjp(lambda p: functional_call(module, p, args, kwargs), parameters)[1]
        return pull(dy_sample.unsqueeze(0))[0]

    held = {name: p for name, p in call.module._parameters.items() if p is not None}
    with gathered_parameters(list(held.values())):
        parameters = {name: held[name].detach() for name in sorted(wanted)}
        grads = vmap(local, in_dims=(0, *dims))(dy, *inputs)
    return {name: Dense(gradient) for name, gradient in grads.items()}


def input_dimension(module: nn.Module) -> int | None:
    """The dimension of a linear layer's weight that its input multiplies, 1 in [O, I]; None for other modules."""
    from transformers.pytorch_utils import Conv1D

    forward = type(module).forward
    if forward is nn.Linear.forward or dequantizes(type(module)):
        return 1
    return 0 if forward is Conv1D.forward else None


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for a module's forward; None if no rule applies.

    A subclass that overrides `forward` gets the generic rule.
    """
    dimension, forward = input_dimension(module), type(module).forward
    if dimension is not None:
        return _linear if dimension == 1 else _conv1d
    if forward is nn.Embedding.forward:
        return _embedding if module.max_norm is None and not module.scale_grad_by_freq else None
    if forward is nn.LayerNorm.forward:
        return _layer_norm
    if is_affine(module):
        return _affine
    if next(module.children(), None) is None:
        return _generic
    return None


def is_generic(rule: Rule) -> bool:
    """Whether the rule runs the module's forward again."""
    return rule in (_affine, _generic)
