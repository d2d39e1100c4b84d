"""Linear layers with quantised weights: each product dequantises its weight and frees it afterwards.

The layers of bitsandbytes round the input to 8 bits, or use kernels that round differently. Here the forward and the
backward pass are those of a linear layer with the dequantised weight, on CPUs and GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from irdscale.errors import InputError
from irdscale.utils.quantized import any_quantized, dequantized, is_quantized, quantized_shape, set_dtype

# Attributes of a model and of its configuration that mark it as quantised; transformers reads them to save it.
_OF_MODEL = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized")
_OF_CONFIG = ("quantization_config", "_is_quantized", "_pre_quantization_dtype")


class _Matmul(torch.autograd.Function):
    """x W^T + b with a frozen W, which is dequantised in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return F.linear(x, dequantized(weight).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy @ dequantized(ctx.weight).to(dy.dtype) if ctx.needs_input_grad[0] else None
        wants_bias = ctx.needs_input_grad[2]
        return dx, None, dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if wants_bias else None


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    kind = input.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(kind))
    bias = module._parameters.get("bias")
    return cast(Tensor, _Matmul.apply(input, module._parameters["weight"], bias))


def dequantizes(kind: type[nn.Module]) -> bool:
    """Whether modules of this class multiply by their dequantised weight: whether `adopt` made the class."""
    return getattr(kind.forward, "__wrapped__", kind.forward) is _forward


@cache
def _adopted(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Dequantizing{original.__name__}", (original,), {"forward": _forward, "_bitsandbytes": original})


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear, nn.Parameter]]:
    """Path, module and weight of each linear layer with a quantised weight."""
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight is not None and is_quantized(weight):
            yield path, module, weight


def adopt(model: nn.Module) -> nn.Module:
    """Make a model that transformers loaded with bitsandbytes multiply by its dequantised weights, in place.

    The quantised weights do not change, and the Trainer accepts the model. Models without any are unchanged.

    Raises:
        InputError: a forward pass of bitsandbytes has put a weight's codes in the order of its CPU kernels.
    """
    if not any_quantized(model):
        return model
    dtype = getattr(model, "dtype", torch.float32)
    for path, module, weight in quantized_linears(model):
        if dequantizes(type(module)):
            continue
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise InputError(
                "found codes in the order of bitsandbytes' CPU kernels",
                "a model that has made no forward pass yet",
                where=f"{path}.weight",
            )
        if getattr(weight, "quant_state", None) is None:
            set_dtype(weight, dtype)
        weight.requires_grad_(False)
        object.__setattr__(module, "__class__", _adopted(type(module)))  # type: ignore[arg-type]
    for name in ("quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(name, None)
    vars(model)["is_quantized"] = False
    return model


def make_plain(model: nn.Module, matrix: Callable[[nn.Parameter], Tensor] = dequantized) -> nn.Module:
    """Replace the linear layers with quantised weights by plain ones with dequantised weights, one at a time.

    A Conv1D, whose weight bitsandbytes transposes, becomes a Conv1D again.

    Args:
        matrix: function from a quantised weight to its matrix [O, I].
    """
    adopt(model)
    for path, module, weight in list(quantized_linears(model)):
        model.set_submodule(path, _plain(module, matrix(weight)))
    for name in _OF_MODEL:
        vars(model).pop(name, None)
    config = getattr(model, "config", None)
    for name in _OF_CONFIG:
        vars(config).pop(name, None) if config is not None else None
    return model


def _plain(module: nn.Linear, weight_OI: Tensor) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        if issubclass(vars(module).get("source_cls", nn.Linear), Conv1D):
            made: nn.Module = Conv1D(weight_OI.shape[0], weight_OI.shape[1])
            weight = weight_OI.t().contiguous()
        else:
            made = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=module.bias is not None)
            weight = weight_OI
    made.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    made.register_parameter("bias", module._parameters.get("bias"))
    return made.train(module.training)


def refuse_quantized(model: nn.Module, names: list[str], key: str) -> None:
    """Refuse to train a quantised weight densely.

    Raises:
        InputError: names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if name in names and is_quantized(parameter):
            raise InputError(
                f"found the quantised weight {name} {quantized_shape(parameter)}",
                "parameters that are not quantised (norms, biases, embeddings, heads), or a mask over this one",
                key=key,
            )
