"""Measured rates of devices, each with its source; planned times rest on them and on link bandwidths.

Rates are shares of a device's peak (`irdscale.plan.hardware`). GPUs other than the H100 were not measured and use its
shares, which the plan's output states. "GPU table" means one NVIDIA H100 80 GB HBM3 (torch 2.11+cu130, Triton 3.6,
transformers 5.17; one run, medians) with random Llamas in bfloat16: 1B-like (hidden size 2048, MLP 8192, 16 layers)
with 8 x 512 tokens, 8B-like (4096, 14336, 32) with 4 x 512. "README" means irdscale/bench/README.md, on 2 CPU cores.
"""

from __future__ import annotations

from dataclasses import dataclass

from irdscale.memory.sizes import StepKind


@dataclass(frozen=True)
class Measured:
    """A number and its source."""

    value: float
    source: str


@dataclass(frozen=True)
class Shares:
    """Rates of one dtype.

    Attributes:
        passes: share of the peak in a forward pass and its input gradients.
        gradients: share of the peak in weight gradients.
        squares: speed of squared per-sample gradients over that of weight gradients.
    """

    passes: Measured
    gradients: Measured
    squares: Measured


@dataclass(frozen=True)
class Rates:
    """Rates of one device.

    Attributes:
        device: name in `irdscale.plan.hardware.GPUS`.
        steps: time of a training step over that of the limit, with masks of 0.5 %.
    """

    device: str
    bfloat16: Shares
    float32: Shares
    steps: dict[StepKind, Measured]


_PRODUCT = Measured(
    0.57,
    "GPU table: a float32 product a sample, squared and added, at 0.06-0.07 of cuBLAS in bfloat16: 0.06 x 642 of 67 "
    "TFLOP/s",
)
H100 = Rates(
    "h100-80gb",
    bfloat16=Shares(
        passes=Measured(
            0.29,
            "GPU table: plain forward+backward of 32 x 512 tokens, 1B-like, 0.3-0.4 s, less its weight gradients at "
            "their speed: 0.35 s taken, 0.35 to 0.25 at its ends",
        ),
        gradients=Measured(
            0.65, "GPU table: cuBLAS, [8192, 2048] 642 of 989 TFLOP/s; [2048, 2048] 484, [14336, 4096] 718"
        ),
        squares=Measured(
            0.61, "GPU table: nested loops, tile 128 x 128 x 64, 8 warps, 4 stages; the middle of 0.61, 0.63, 0.53"
        ),
    ),
    float32=Shares(
        passes=_PRODUCT,
        gradients=_PRODUCT,
        squares=Measured(1.0, "in the number of the gradients, which were squared and added"),
    ),
    steps={
        "limit": Measured(1.0, "by definition"),
        "concentrated": Measured(1.007, "GPU table: Fisher mask of 0.5 %, 1B-like"),
        "scattered": Measured(1.41, "GPU table: 0.5 % at random by whole products: 1.42 1B-like, 1.40 8B-like"),
        "lora": Measured(1.87, "GPU table: PEFT, rank 8: 1.99 1B-like, 1.75 8B-like"),
        "full": Measured(1.41, "GPU table: full fine-tuning, 1B-like"),
    },
)

_CPU = Shares(
    passes=Measured(1.0, "the peak is that of measured products: 46-92 10^9 multiplications-and-additions a second"),
    gradients=Measured(1.0, "as the passes"),
    squares=Measured(0.88, "README: Fisher pass / plain forward+backward 1.04-1.05, of which a third is gradients"),
)
CPU = Rates(
    "cpu",
    bfloat16=_CPU,
    float32=_CPU,
    steps={
        "limit": Measured(1.0, "by definition"),
        "concentrated": Measured(1.065, "README: sparse step / limit 1.07 bert, 1.06 llama"),
        "scattered": Measured(1.12, "README: random mask / limit 1.13 bert, 1.11 llama"),
        "lora": Measured(1.28, "README: sparse step / limit over sparse step / LoRA: 1.30 bert, 1.25 llama"),
        "full": Measured(1.47, "README: sparse step / limit over sparse step / full: 1.45 bert, 1.49 llama"),
    },
)
