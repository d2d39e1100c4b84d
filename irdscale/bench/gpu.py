"""What the Fisher pass and sparse gradients gain on a GPU, as ratios measured side by side in one run.

Models are random Llamas in bfloat16 with the widths of the 1B and 8B ones. The kernel's work is compared with the
weight gradient of a whole batch, which multiplies as much but squares nothing.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from irdscale.bench.models import collate, make_rows
from irdscale.bench.timing import row, side_by_side
from irdscale.errors import InputError
from irdscale.fisher import SampleGradients, kernels, scored_parameters
from irdscale.fisher.accumulate import new_sums
from irdscale.fisher.sums import Sums
from irdscale.sparse import kernels as sparse_kernels
from irdscale.sparse.products import Kind, prepare

log = logging.getLogger(__name__)

DEVICE = "cuda"
KERNEL_BAR = 0.8
PASS_BAR = 20.0
KERNEL_REPEATS = 9
PASS_REPEATS = 5
# So many calls are timed as one, for one takes no longer than its launch.
CALLS = 20
BATCH, TOKENS = 8, 512
SAMPLES = 64
# Entries of a sparse mask, and the share of rows and of columns that hold them.
SPARSE_RATIO = 0.005
KINDS: tuple[Kind, ...] = ("dense", "tiles")
SPARSE_SHARES = {"in 1/8 of rows and columns": 1 / 8, "scattered": 1.0}
PASS_TOKENS = (32, 128, 512)


@dataclass(frozen=True)
class Size:
    """A Llama's widths."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    key_value_heads: int = 8
    vocabulary: int = 128_256


SIZES = {"1B-like": Size(2048, 8192, 16, 32), "8B-like": Size(4096, 14336, 32, 32)}


def run_gpu_bench() -> list[dict[str, Any]]:
    """Measure the kernels and the Fisher pass on the first GPU; what does not fit its memory is logged and left out.

    Returns:
        Rows as those of `irdscale.bench.run_bench`.

    Raises:
        InputError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise InputError("bench: found no CUDA device; expected one to measure the GPU's part on")
    rows: list[dict[str, Any]] = []
    for name, size in SIZES.items():
        rows += _kernel_rows(name, size)
        rows += _sparse_rows(name, size)
        _free()
    for name, size in SIZES.items():
        rows += _pass_rows(name, size)
        _free()
    return rows


def _kernel_rows(name: str, size: Size) -> list[dict[str, Any]]:
    rows = []
    for p, q in ((size.hidden, size.hidden), (size.mlp, size.hidden), (size.hidden, size.mlp)):
        for dtype in (torch.bfloat16, torch.float32):
            left_BTP, right_BTQ = _draw(p, dtype), _draw(q, dtype)
            total_PQ = torch.zeros(p, q, device=DEVICE)
            if not kernels.usable(left_BTP, right_BTQ, total_PQ):
                log.warning("bench: the Triton kernel does not run here for %s; its rows are left out", dtype)
                continue
            seconds = side_by_side(_kernel_and_others(left_BTP, right_BTQ, total_PQ), KERNEL_REPEATS)
            shape = f"[{p}, {q}] {str(dtype).removeprefix('torch.')}"
            # Float32 goes without the tensor cores, to be exact, and has no bar.
            bar = KERNEL_BAR if dtype == torch.bfloat16 else None
            what = f"cuBLAS weight gradient / kernel, {shape}"
            rows.append(row("fisher", what, name, TOKENS, seconds, "gradient", "kernel", at_least=bar))
            what = f"squares sample by sample / kernel, {shape}"
            rows.append(row("fisher", what, name, TOKENS, seconds, "samples", "kernel"))
    return rows


def _sparse_rows(name: str, size: Size) -> list[dict[str, Any]]:
    """The k entries of a weight's gradient: the whole product then a gather, over the tiles that hold entries."""
    rows: list[dict[str, Any]] = []
    for p, q in ((size.hidden, size.hidden), (size.mlp, size.hidden), (size.hidden, size.mlp)):
        left_NP, right_NQ = (_draw(width, torch.bfloat16).flatten(0, 1) for width in (p, q))
        if not sparse_kernels.usable(left_NP, right_NQ):
            log.warning("bench: the Triton kernel for sparse gradients does not run here; its rows are left out")
            return rows
        for where, share in SPARSE_SHARES.items():
            index = _draw_entries(p, q, share)
            measured: dict[str, Callable[[], object]] = {}
            for kind in KINDS:
                measured[kind] = partial(prepare(index, (p, q), kind).entries, left_NP, right_NQ, index)
            seconds = side_by_side(_synchronised(measured, CALLS), KERNEL_REPEATS)
            what = f"whole product and gather / tiles that hold entries, [{p}, {q}] bfloat16, {where}"
            rows.append(row("train", what, name, TOKENS, seconds, "dense", "tiles"))
    return rows


def _draw_entries(p: int, q: int, share: float) -> Tensor:
    """Flat indices of random entries within the first rows and columns, int32, sorted."""
    p_active, q_active = max(1, int(p * share)), max(1, int(q * share))
    k = min(p_active * q_active, max(1, round(SPARSE_RATIO * p * q)))
    chosen = torch.randperm(p_active * q_active, generator=torch.Generator().manual_seed(0))[:k].sort().values
    return (chosen // q_active * q + chosen % q_active).to(DEVICE, torch.int32)


def _draw(width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, TOKENS, width, device=DEVICE, dtype=dtype)


def _kernel_and_others(left_BTP: Tensor, right_BTQ: Tensor, total_PQ: Tensor) -> dict[str, Callable[[], None]]:
    left_NP, right_NQ = left_BTP.flatten(0, 1), right_BTQ.flatten(0, 1)
    gradient_PQ = torch.empty(total_PQ.shape, device=DEVICE, dtype=left_BTP.dtype)
    square_PQ = torch.empty_like(total_PQ)

    def sample_by_sample() -> None:
        for left_TP, right_TQ in zip(left_BTP.float(), right_BTQ.float(), strict=True):
            torch.mm(left_TP.t(), right_TQ, out=square_PQ)
            total_PQ.addcmul_(square_PQ, square_PQ)

    return _synchronised(
        {
            "gradient": lambda: torch.mm(left_NP.t(), right_NQ, out=gradient_PQ),
            "kernel": lambda: kernels.add_squared_products(left_BTP, right_BTQ, total_PQ),
            "samples": sample_by_sample,
        },
        CALLS,
    )


def _synchronised(measured: Mapping[str, Callable[[], object]], calls: int) -> dict[str, Callable[[], None]]:
    """Each function `calls` times, until the GPU is done."""

    def until_done(function: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                function()
            torch.cuda.synchronize()

        return run

    return {name: until_done(function) for name, function in measured.items()}


def _pass_rows(name: str, size: Size) -> list[dict[str, Any]]:
    rows = []
    try:
        model = _make_model(size)
        scored = scored_parameters(model)
        sums: Sums | None = None
        for tokens in PASS_TOKENS:
            data = make_rows(tokens, SAMPLES)
            samples = SampleGradients(model, data, collate, scored, batch_size=SAMPLES)
            sums = sums or new_sums(samples, range(SAMPLES))
            measured = {"loop": _one_sample_loop(model, data, sums), "fisher": _fisher(samples, data, sums)}
            # Batches are halved until they fit.
            measured["fisher"]()
            seconds = side_by_side(_synchronised(measured, 1), PASS_REPEATS)
            what = f"one-sample loop (FISH) / Fisher pass, batches of {samples.fitting}"
            rows.append(row("fisher", what, name, tokens, seconds, "loop", "fisher", at_least=PASS_BAR))
    except (torch.OutOfMemoryError, InputError):
        log.warning("bench: %s does not fit the GPU beside its sums and gradients; its rows end here", name)
    return rows


def _make_model(size: Size) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        vocab_size=size.vocabulary,
        pad_token_id=0,
    )
    with torch.device(DEVICE):
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _on_device(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: value.to(DEVICE) for key, value in collate(rows).items()}


def _fisher(samples: SampleGradients, data: list[Any], sums: Sums) -> Callable[[], None]:
    return lambda: samples.accumulate(range(len(data)), sums)


def _one_sample_loop(model: Any, data: list[Any], sums: Sums) -> Callable[[], None]:
    """As FISH takes its diagonal: one sample a backward pass, and every parameter's gradient squared on its own."""

    def run() -> None:
        for sample in data:
            model(**_on_device([sample])).loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums.tensors[name] += parameter.grad.square()
            model.zero_grad(set_to_none=True)

    return run


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
