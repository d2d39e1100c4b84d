"""Check whether Triton's kernels can run. This module can be imported without Triton."""

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
    """Whether Triton interprets its kernels, which works on any device (TRITON_INTERPRET=1)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def why_not_on(device: torch.device) -> str | None:
    """Why kernels cannot run on the device, or None if they can."""
    if triton is None:
        return "found no triton; expected it installed"
    if interpreting():
        return None
    if device.type != "cuda":
        return f"found device {device}; expected cuda"
    capability = torch.cuda.get_device_capability(device)
    # Tensor cores support bfloat16 from compute capability 8.0 up.
    too_old = torch.version.hip is None and capability < (8, 0)
    return f"found compute capability {capability}; expected at least (8, 0)" if too_old else None


def comes_out_right(what: str, device: torch.device, example: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    """Whether a small example of a kernel gives the right result; a failure is logged.

    For example, Triton may find no C compiler, or an unsuitable driver.

    Args:
        what: name of the kernel's results, for the log.
        example: runs the kernel; returns its result, and the expected one in float64 on the CPU.
    """
    try:
        found, expected = example()
        error = float((found.cpu().double() - expected).abs().max() / expected.abs().max())
    except Exception as problem:  # compilers and drivers raise any type of error; PyTorch is used instead
        log.warning("%s go without their Triton kernel on %s: %s", what, device, problem)
        return False
    if not error < 1e-4:
        log.warning("%s go without their Triton kernel on %s: it is wrong by %.0e", what, device, error)
    return error < 1e-4
