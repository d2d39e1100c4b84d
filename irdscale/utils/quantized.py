"""Weights that bitsandbytes has quantised to 4 or 8 bits: their shape, their parts, and their dequantised matrix.

Such a parameter is frozen. `dequantized(parameter)` is its matrix [O, I] of a float type, a new tensor for each use.
NF4 with double quantisation is that of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3); 8-bit weights are
scaled by each row's largest magnitude (Dettmers et al. 2022, arXiv 2208.07339). bitsandbytes is imported at the first
dequantisation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Attribute of an 8-bit weight with the type of its dequantised matrix; 4-bit weights have one of bitsandbytes.
_DTYPE = "_irdscale_dtype"


def is_quantized(parameter: Tensor) -> bool:
    """Whether the parameter is a quantised weight."""
    return getattr(parameter, "quant_state", None) is not None or getattr(parameter, "SCB", None) is not None


def any_quantized(model: nn.Module) -> bool:
    """Whether the model has a quantised weight."""
    return any(is_quantized(parameter) for parameter in model.parameters())


def quantized_shape(parameter: Tensor) -> tuple[int, ...] | None:
    """Shape of a quantised weight's dequantised matrix; None for other parameters."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return tuple(state.shape)
    return tuple(parameter.shape) if is_quantized(parameter) else None


def dtype_of(parameter: Tensor) -> torch.dtype:
    """Type of a parameter; of a quantised weight, that of its dequantised matrix."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        found = state.dtype
    elif is_quantized(parameter):
        found = getattr(parameter, _DTYPE, torch.float32)
    else:
        found = parameter.dtype
    assert isinstance(found, torch.dtype)
    return found


def set_dtype(parameter: Tensor, dtype: torch.dtype) -> None:
    """Set the type of a quantised weight's dequantised matrix."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        state.dtype = dtype
    else:
        vars(parameter)[_DTYPE] = dtype


def dequantized(parameter: Tensor) -> Tensor:
    """A quantised weight's matrix [O, I], as a new tensor of type `dtype_of(parameter)`."""
    data, state = parameter.data, getattr(parameter, "quant_state", None)
    if data.is_meta and state is not None:
        # The same allocations as with values: the scales and the matrix.
        scales = torch.empty(len(state.absmax), dtype=torch.float32, device="meta")
        return torch.empty(state.shape, dtype=state.dtype, device=scales.device)
    with torch.no_grad():
        if state is not None:
            import bitsandbytes.functional as quantization

            if state.absmax.device != data.device:
                state.to(data.device)
            matrix = quantization.dequantize_4bit(data, state)
        else:
            scale_O = parameter.SCB  # type: ignore[attr-defined]
            if scale_O.device != data.device:
                scale_O = vars(parameter)["SCB"] = scale_O.to(data.device)
            matrix = (data * (scale_O.float().view(-1, 1) / 127)).to(dtype_of(parameter))
    assert isinstance(matrix, Tensor)
    return matrix


def parts_of(parameter: Tensor) -> dict[str, Tensor]:
    """All tensors that a quantised weight's matrix depends on, its codes first."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return {"": parameter.data, ".scale": parameter.SCB}  # type: ignore[attr-defined]
    sizes = torch.tensor([state.blocksize, *state.shape])
    parts = {"": parameter.data, ".absmax": state.absmax, ".code": state.code, ".sizes": sizes}
    if state.nested:
        nested = state.state2
        parts |= {".absmax2": nested.absmax, ".code2": nested.code, ".offset": state.offset}
        parts[".size2"] = torch.tensor([nested.blocksize])
    return parts
