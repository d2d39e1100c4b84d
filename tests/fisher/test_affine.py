"""Modules that are affine in their weights, and their slopes against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from irdscale.fisher.affine import is_affine, slope

WIDTH = 6


class Scaled(nn.Module):
    """A vector of weights, used in some way."""

    def __init__(self, use: Any, shape: tuple[int, ...] = (WIDTH,)) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape)), use

    def forward(self, x: Tensor) -> Any:
        return self.use(x, self.weight)


@pytest.mark.parametrize(
    ("module", "rtol"),
    [
        (nn.RMSNorm(WIDTH), 1e-12),
        # These compute in float32 inside.
        (LlamaRMSNorm(WIDTH), 1e-6),
        (T5LayerNorm(WIDTH), 1e-6),
        (GemmaRMSNorm(WIDTH), 1e-6),
        (Scaled(lambda x, w: x.tanh() * (1 + w) + x), 1e-12),
        (Scaled(lambda x, w: x + w), 1e-12),
    ],
)
def test_the_slope_is_autograds(module: Any, rtol: float) -> None:
    assert is_affine(module)
    module.double()
    with torch.no_grad():
        module.weight.normal_()
    x = torch.randn(4, 5, WIDTH, dtype=torch.float64)
    expected = torch.stack(
        [torch.autograd.grad(module(x).flatten(0, 1)[t].sum(), module.weight)[0] for t in range(20)]
    ).view_as(x)
    torch.testing.assert_close(slope(module, x), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    "module",
    [
        Scaled(lambda x, w: x * w.square()),
        Scaled(lambda x, w: x * w.clamp(-2, 2)),
        Scaled(lambda x, w: x * w.cumsum(0)),
        Scaled(lambda x, w: x * w.roll(1)),
        Scaled(lambda x, w: (x * w).mean(-1)),
        Scaled(lambda x, w: (x * w, x)),
        Scaled(lambda x, w: x * w.log()),
        Scaled(lambda x, w: x * w[:, None], (3,)),
        Scaled(lambda x, w: x @ w, (WIDTH, WIDTH)),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, WIDTH, bias=False),
        nn.Sequential(nn.RMSNorm(WIDTH)),
        nn.ReLU(),
    ],
    ids=[
        "square",
        "clamp",
        "cumsum",
        "roll",
        "mean",
        "two",
        "nan",
        "rows",
        "matrix",
        "LayerNorm",
        "Linear",
        "parent",
        "none",
    ],
)
def test_other_modules_are_not_taken_for_affine(module: nn.Module) -> None:
    assert not is_affine(module)


def test_half_precision_is_widened() -> None:
    module = LlamaRMSNorm(WIDTH).bfloat16()
    x = torch.randn(2, 3, WIDTH).bfloat16()
    assert is_affine(module)
    found = slope(module, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.float() * (x.float().square().mean(2, keepdim=True) + 1e-6).rsqrt())
