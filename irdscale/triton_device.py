"""Where Triton's kernels can run. Imports without Triton."""

from __future__ import annotations

import torch

try:
    import triton
except ImportError:
    triton = None


def interpreting() -> bool:
    """Whether Triton interprets its kernels, on any device (TRITON_INTERPRET=1)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def why_not_on(device: torch.device) -> str | None:
    """What was found and expected where kernels cannot run on the device; None where they can."""
    if triton is None:
        return "found no triton; expected it installed"
    if interpreting():
        return None
    if device.type != "cuda":
        return f"found device {device}; expected cuda"
    capability = torch.cuda.get_device_capability(device)
    # Tensor cores take bfloat16 from this generation on.
    too_old = torch.version.hip is None and capability < (8, 0)
    return f"found compute capability {capability}; expected at least (8, 0)" if too_old else None
