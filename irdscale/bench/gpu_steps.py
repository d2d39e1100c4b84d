"""Training steps of a language model on a GPU: sparse, LoRA and full steps over the limit, and their peak memory.

The limit is a forward pass and the input gradients, down to the embeddings, with nothing trainable. All steps use the
model's own loss, with the logits of all tokens at once. The frozen weights are shared; full fine-tuning has its own.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from irdscale.bench import gpu_models
from irdscale.bench.gpu_models import (
    MATRICES,
    SIZES,
    allocated,
    collate,
    free,
    make_model,
    make_rows,
    on_device,
    peak_of,
)
from irdscale.bench.models import Step, training_step
from irdscale.bench.timing import figure, row, side_by_side
from irdscale.fisher import accumulate_fisher, scored_parameters
from irdscale.masks.mask import Mask, index_dtype, top_k
from irdscale.memory.sizes import StepKind
from irdscale.memory.steps import step_peak
from irdscale.sparse import sparsify
from irdscale.utils.formats import GIB, size

log = logging.getLogger(__name__)

REPEATS = 5
RATIO, SPARSER = 0.005, 0.002
LORA_RANK = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_BAR = 0.65
PLAN_BAR = 1.1
# Size and kind of step -> peak bytes.
Peaks = dict[tuple[str, str], int]
FISHER, SCATTERED, LESS = "Fisher mask 0.5 %", "random mask 0.5 %", "random mask 0.2 %"
# Highest ratios to the limit.
BARS: dict[str, float | None] = {FISHER: 1.03, SCATTERED: 1.12, LESS: 1.06, "LoRA r=8 (PEFT)": None, "full": None}
# The plan's name of the kind, and the mask's share of the entries.
PLANNED: dict[str, tuple[StepKind, float]] = {
    "limit": ("limit", RATIO),
    FISHER: ("concentrated", RATIO),
    SCATTERED: ("scattered", RATIO),
    LESS: ("scattered", SPARSER),
    "LoRA r=8 (PEFT)": ("lora", RATIO),
    "full": ("full", RATIO),
}
# Kinds measured only on the smaller size: they need a Fisher pass or full fine-tuning.
ONLY_FIRST = (FISHER, "full")


def step_rows(name: str, peaks: Peaks) -> Iterator[dict[str, Any]]:
    """Peaks of all kinds of steps that fit the GPU, each as it is measured; then their times, side by side.

    Args:
        peaks: receives the peaks, for `plan_rows`.
    """
    size = SIZES[name]
    free()
    before = allocated()
    model = make_model(size)
    weights = allocated() - before
    data = make_rows(size, size.batch)
    batch = {key: value for key, value in on_device(data).items() if key != "attention_mask"}
    steps: dict[str, Step] = {}
    for kind, make in _makers(model, data).items():
        if kind in ONLY_FIRST and name != next(iter(SIZES)):
            continue
        free()
        own = allocated()
        try:
            step = training_step(make(), batch, trains=kind != "limit")
            step()
            step()
            # The frozen weights count for each kind; full fine-tuning has allocated its own.
            peak = peak_of(step) - own + (0 if kind == "full" else weights)
        except torch.OutOfMemoryError:
            log.warning("bench: %s does not fit the GPU: %s; its rows are left out", name, kind)
            continue
        except ImportError:
            log.warning("bench: found no peft; the rows of LoRA are left out")
            continue
        steps[kind] = step
        peaks[name, kind] = peak
        yield figure("train", f"peak memory of a step, GiB: {kind}", name, gpu_models.TOKENS, peak / GIB)
    free()
    seconds = side_by_side(gpu_models.synchronised(steps), REPEATS)
    tokens = gpu_models.TOKENS
    for kind, bar in BARS.items():
        if kind in seconds and "limit" in seconds:
            what = f"step / the limit (forward + input gradients): {kind}, batch {size.batch}"
            yield row("train", what, name, tokens, seconds, kind, "limit", limit=bar)
    for kind in (FISHER, SCATTERED):
        if kind in seconds and "LoRA r=8 (PEFT)" in seconds:
            what = f"step, {kind} / LoRA r=8 (PEFT)"
            yield row("train", what, name, tokens, seconds, kind, "LoRA r=8 (PEFT)", limit=LORA_BAR)


def _makers(model: Any, data: list[dict[str, Any]]) -> dict[str, Callable[[], Any]]:
    """Kind of step -> function that makes its model from the frozen one."""
    return {
        "limit": lambda: _at_the_limit(gpu_models.sharing(model)),
        SCATTERED: lambda: sparsify(gpu_models.sharing(model), random_mask(model, RATIO)),
        "LoRA r=8 (PEFT)": lambda: _with_lora(gpu_models.sharing(model)),
        LESS: lambda: sparsify(gpu_models.sharing(model), random_mask(model, SPARSER)),
        FISHER: lambda: sparsify(gpu_models.sharing(model), _fisher_mask(model, data)),
        "full": lambda: copy.deepcopy(model).requires_grad_(True),
    }


def _at_the_limit(model: Any) -> Any:
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, y: y.detach().requires_grad_())
    return model


def _with_lora(model: Any) -> Any:
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, target_modules=TARGETS)
    return peft.get_peft_model(model, config).eval()


def _fisher_mask(model: Any, data: list[dict[str, Any]]) -> Mask:
    fisher = accumulate_fisher(model, data, collate_fn=collate, include=MATRICES)
    return top_k(fisher, round(RATIO * sum(torch.Size(shape).numel() for shape in fisher.shapes.values())))


def random_mask(model: nn.Module, ratio: float) -> Mask:
    """About this share of the entries of every matrix of the decoder, drawn independently on the GPU."""
    generator = torch.Generator(gpu_models.DEVICE).manual_seed(0)
    indices, shapes = {}, {}
    for name, p in scored_parameters(model, include=MATRICES).items():
        chosen = torch.rand(p.numel(), device=gpu_models.DEVICE, generator=generator) < ratio
        indices[name] = chosen.nonzero().flatten().to("cpu", index_dtype(p.numel()))
        shapes[name] = tuple(p.shape)
    return Mask({name: index for name, index in indices.items() if len(index)}, shapes)


def plan_rows(peaks: Peaks) -> Iterator[dict[str, Any]]:
    """The larger of a step's planned and measured peaks over the smaller."""
    for (name, kind), peak in peaks.items():
        planned = planned_peak(name, kind)
        what = f"plan ({size(planned)}) and measured peak ({size(peak)}) apart: {kind}"
        apart = max(planned / peak, peak / planned)
        yield figure("train", what, name, gpu_models.TOKENS, apart, limit=PLAN_BAR)


def planned_peak(name: str, kind: str) -> int:
    """Bytes that `irdscale.plan` expects at the peak of a step of this kind."""
    size, (planned, ratio) = SIZES[name], PLANNED[kind]
    model = make_model(size, "meta")
    return step_peak(model, planned, size.batch, gpu_models.TOKENS, ratio=ratio, rank=LORA_RANK)
