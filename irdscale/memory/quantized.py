"""A quantised base on the meta device, whose tensors have the sizes of those that bitsandbytes keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from irdscale.models.quantize import linears_outside
from irdscale.models.quantized import adopt
from irdscale.utils.quantized import is_quantized, parts_of, set_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Entries that share a scale, and scales that share a nested scale (defaults of bitsandbytes).
BLOCK, NESTED = 64, 256
META = torch.device("meta")


def _empty(count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(count, dtype=dtype, device=META)


@dataclass
class _Nested:
    """The nested scales of double quantisation."""

    absmax: Tensor
    code: Tensor = field(default_factory=lambda: _empty(256, torch.float32))
    blocksize: int = NESTED


@dataclass
class _State:
    """The tensors and sizes that bitsandbytes keeps beside the 4-bit codes of a matrix."""

    shape: torch.Size
    dtype: torch.dtype
    absmax: Tensor
    state2: _Nested
    code: Tensor = field(default_factory=lambda: _empty(16, torch.float32))
    offset: Tensor = field(default_factory=lambda: _empty(1, torch.float32))
    blocksize: int = BLOCK
    nested: bool = True


def quantize_on_meta(model: PreTrainedModel, kind: Literal["nf4", "int8"]) -> None:
    """Give the linear layers of a base on the meta device quantised weights, as `irdscale.models.build` loads them."""
    from transformers.pytorch_utils import Conv1D

    kept = set(linears_outside(model))
    for path, module in list(model.named_modules()):
        if path in kept or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        with META:
            linear = nn.Linear(shape[1], shape[0], module.bias is not None, dtype=module.weight.dtype)
        numel, dtype = shape.numel(), module.weight.dtype
        if kind == "nf4":
            weight = nn.Parameter(_empty(-(-numel // 2)).view(-1, 1), requires_grad=False)
            scales = -(-numel // BLOCK)
            nested = _Nested(_empty(-(-scales // NESTED), torch.float32))
            vars(weight)["quant_state"] = _State(shape, dtype, _empty(scales), nested)
        else:
            weight = nn.Parameter(_empty(numel, torch.int8).view(shape), requires_grad=False)
            vars(weight)["SCB"] = _empty(shape[0], torch.float32)
            set_dtype(weight, dtype)
        linear.register_parameter("weight", weight)
        model.set_submodule(path, linear.train(module.training))
    adopt(model)


def base_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, including the scales of quantised weights."""
    tensors = [t for p in model.parameters() for t in (parts_of(p).values() if is_quantized(p) else (p,))]
    return sum(t.nbytes for t in tensors if t.device == META)
