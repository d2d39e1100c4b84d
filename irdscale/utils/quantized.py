"""Weights that bitsandbytes keeps in 4 or 8 bits: their shape, their parts, and the matrix that they stand for.

Such a parameter is frozen. It stands for a matrix [O, I] of a float type, `dequantized(parameter)`, which is made anew
for each use. NF4 with double quantisation is that of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3); weights
of 8 bits are scaled by each row's largest magnitude (Dettmers et al. 2022, arXiv 2208.07339). bitsandbytes is imported
when a matrix is made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The type of the matrix that 8-bit weights stand for; those of 4 bits say it themselves.
_DTYPE = "_irdscale_dtype"


def is_quantized(parameter: Tensor) -> bool:
    """Whether the parameter is a quantised weight."""
    return getattr(parameter, "quant_state", None) is not None or getattr(parameter, "SCB", None) is not None


def any_quantized(model: nn.Module) -> bool:
    """Whether the model has a quantised weight."""
    return any(is_quantized(parameter) for parameter in model.parameters())


def quantized_shape(parameter: Tensor) -> tuple[int, ...] | None:
    """Shape of the matrix that a quantised weight stands for; None for any other parameter."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return tuple(state.shape)
    return tuple(parameter.shape) if is_quantized(parameter) else None


def dtype_of(parameter: Tensor) -> torch.dtype:
    """Type of a parameter's numbers; of a quantised weight, of the matrix that it stands for."""
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
    """Set the type of the matrix that a quantised weight stands for."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        state.dtype = dtype
    else:
        vars(parameter)[_DTYPE] = dtype


def dequantized(parameter: Tensor) -> Tensor:
    """The matrix that a quantised weight stands for, [O, I], as a new tensor of `dtype_of(parameter)`."""
    data, state = parameter.data, getattr(parameter, "quant_state", None)
    if data.is_meta and state is not None:
        # As many bytes as are made elsewhere: of the scales, and of the matrix.
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
    """The tensors that a quantised weight consists of, its codes first; all that its matrix depends on."""
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
