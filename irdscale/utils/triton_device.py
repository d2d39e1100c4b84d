"""Where Triton's kernels can run. Imports without Triton."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
except ImportError:
    triton = None

log = logging.getLogger(__name__)


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


def comes_out_right(what: str, device: torch.device, example: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    """Whether a kernel's small example does; Triton needs a C compiler and a driver that fits, for one.

    A failure is logged.

    Args:
        what: the work that goes without its kernel where it does not, for the log.
        example: runs the kernel; what it found, and what is expected in float64 on the CPU.
    """
    try:
        found, expected = example()
        error = float((found.cpu().double() - expected).abs().max() / expected.abs().max())
    except Exception as problem:  # whatever a compiler or driver raises, the plain way works
        log.warning("%s go without their Triton kernel on %s: %s", what, device, problem)
        return False
    if not error < 1e-4:
        log.warning("%s go without their Triton kernel on %s: it is wrong by %.0e", what, device, error)
    return error < 1e-4
