"""Measured rates, and the times that follow from them."""

from __future__ import annotations

import dataclasses

import pytest

from irdscale.memory.sizes import Shapes, columns_held
from irdscale.plan.hardware import GPUS
from irdscale.plan.rates import CPU, H100, Rates
from irdscale.plan.work import sample_flops

LAYER = {"q": (2048, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 2048)}
LAYER |= {"gate": (8192, 2048), "up": (8192, 2048), "down": (2048, 8192)}
# The 1B-like Llama of the measurements.
ONE = Shapes(
    parameters=1_498_482_688,
    item=2,
    scored={f"{layer}.{name}": shape for layer in range(16) for name, shape in LAYER.items()},
    dense=0,
    products=[*(shape for _ in range(16) for shape in LAYER.values()), (128_256, 2048)],
    largest=128_256 * 2048,
    layer=60_821_504,
    hidden=2048,
    layers=16,
    attention=2048,
    causal=True,
    positions=None,
)


def test_a_plain_pass_takes_what_was_measured():
    """Forward and backward with all weights' gradients, of 32 samples of 512 tokens: 0.3 to 0.4 s on an H100."""
    gpu, one = GPUS["h100-80gb"], sample_flops(ONE, 512)
    every = 2.0 * 512 * sum(rows * columns for rows, columns in ONE.products)
    seconds = 32 * ((one.forward + one.backward) / gpu.pass_flops(2) + every / gpu.gradient_flops(2))
    assert seconds == pytest.approx(0.35, rel=0.02)


def test_the_gradients_of_a_scattered_mask_explain_their_step():
    """Whole products alone are less than what such a step takes over the limit; the gather is the rest."""
    gpu, one = GPUS["h100-80gb"], sample_flops(ONE, 512)
    limit = (one.forward + one.backward) / gpu.pass_flops(2)
    products = one.weights / gpu.gradient_flops(2)
    assert 0.1 < products / limit < gpu.step_over_limit("scattered") - 1


def test_speeds():
    gpu = GPUS["h100-80gb"]
    assert gpu.gradient_flops(2) == pytest.approx(642e12, rel=0.01)
    assert gpu.square_flops(2) == 0.61 * gpu.gradient_flops(2)
    assert gpu.gradient_flops(4) == gpu.square_flops(4) == pytest.approx(0.06 * 642e12, rel=0.01)
    assert GPUS["cpu"].pass_flops(4) == GPUS["cpu"].pass_flops(2) == 150e9


def test_only_the_h100_and_the_cpu_were_measured():
    assert {name for name, gpu in GPUS.items() if gpu.measured} == {"h100-80gb", "cpu"}
    assert all(gpu.rates is H100 for name, gpu in GPUS.items() if name != "cpu")
    assert GPUS["a100-80gb"].pass_flops(2) == H100.bfloat16.passes.value * 312e12


@pytest.mark.parametrize("rates", [H100, CPU], ids=lambda rates: rates.device)
def test_each_number_has_its_source(rates: Rates):
    shares = [getattr(s, f.name) for s in (rates.bfloat16, rates.float32) for f in dataclasses.fields(s)]
    for measured in (*shares, *rates.steps.values()):
        assert 0 < measured.value < 2
        assert len(measured.source) > 5
    assert set(rates.steps) == {"limit", "concentrated", "scattered", "lora", "full"}


def test_columns_that_hold_entries():
    # As measured on SmolLM2-135M.
    for ratio, share in ((0.002, 0.16), (0.005, 0.28), (0.01, 0.44), (0.02, 0.67)):
        assert columns_held(ratio, scattered=False) == pytest.approx(share, rel=0.16)
    assert columns_held(0.5, scattered=False) == columns_held(0.001, scattered=True) == 1
