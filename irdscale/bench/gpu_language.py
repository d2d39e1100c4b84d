"""A sparse step on a quantised base over one in bfloat16, and generation of answers over `generate`, on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from irdscale.bench import gpu_models
from irdscale.bench.gpu_models import SIZES, on_device, peak_of
from irdscale.bench.gpu_steps import RATIO, random_mask
from irdscale.bench.gpu_trainer import NAME, SIZE
from irdscale.bench.models import Step, training_step
from irdscale.bench.timing import figure, row, side_by_side
from irdscale.models.quantized import adopt
from irdscale.sparse import sparsify
from irdscale.tasks.tokens import pad_batch
from irdscale.training.evaluate_language import generate_greedily
from irdscale.utils.formats import GIB

log = logging.getLogger(__name__)

REPEATS = 5
NF4_BAR = 1.35
GENERATION_BAR = 1.2
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 128, 64


def quantized_rows(name: str) -> Iterator[dict[str, Any]]:
    """A sparse step with a random mask of 0.5 % on an NF4 base over the same step in bfloat16, and its peak memory."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        log.warning("bench: found no usable bitsandbytes (%s); the rows of quantised bases are left out", error)
        return
    size = SIZES[name]
    batch = {k: v for k, v in on_device(gpu_models.make_rows(size, size.batch)).items() if k != "attention_mask"}
    model = gpu_models.make_model(size)
    mask = random_mask(model, RATIO)
    plain = sparsify(gpu_models.sharing(model), mask)
    quantized = sparsify(quantize_decoder(model), mask)
    steps: dict[str, Step] = {"bf16": training_step(plain, batch), "nf4": training_step(quantized, batch)}
    seconds = side_by_side(gpu_models.synchronised(steps), REPEATS)
    what = f"sparse step on an NF4 base / on a bfloat16 base, random mask 0.5 %, batch {size.batch}"
    yield row("train", what, name, gpu_models.TOKENS, seconds, "nf4", "bf16", limit=NF4_BAR)
    # The bfloat16 weights are freed, so the peak is that of the quantised base alone.
    del steps["bf16"], plain, model
    gpu_models.free()
    peak = peak_of(steps["nf4"])
    yield figure("train", "peak memory of a sparse step on an NF4 base, GiB", name, gpu_models.TOKENS, peak / GIB)


def quantize_decoder(model: Any) -> Any:
    """A copy of a model that shares all weights but those of the decoder's linear layers.

    Those are NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3).
    """
    import bitsandbytes

    made = gpu_models.sharing(model)
    for path, module in list(made.model.named_modules()):
        if isinstance(module, nn.Linear):
            # Values become NF4 codes when they are moved to a device.
            weight: Any = bitsandbytes.nn.Params4bit(
                module.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            with torch.device("meta"):
                layer = bitsandbytes.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
                )
            layer.register_parameter("weight", weight.to(module.weight.device))
            made.model.set_submodule(path, layer.eval())
    return adopt(made)


def generation_rows() -> Iterator[dict[str, Any]]:
    """Seconds of `generate_greedily`, which exact match uses, over those of plain `generate` with the same batches."""
    from transformers import GenerationConfig

    model = gpu_models.make_model(SIZE)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(PROMPT_TOKENS // 2, PROMPT_TOKENS + 1, (PROMPTS,), generator=generator).sort()[0].tolist()
    prompts = [torch.randint(5, SIZE.vocabulary, (n,), generator=generator).tolist() for n in lengths]
    task: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), max_new_tokens=NEW_TOKENS)
    options = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0)
    rows = [{"input_ids": tokens} for tokens in prompts]
    batches = [pad_batch(rows[at : at + SIZE.batch], 0, side="left") for at in range(0, PROMPTS, SIZE.batch)]

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model.generate(**{k: v.to(gpu_models.DEVICE) for k, v in batch.items()}, generation_config=options)

    def ours() -> None:
        generate_greedily(model, task, prompts, [], SIZE.batch)

    seconds = side_by_side(gpu_models.synchronised({"ours": ours, "plain": plain}), REPEATS)
    what = f"generation of exact match / plain generate, {PROMPTS} answers of {NEW_TOKENS} tokens, batch {SIZE.batch}"
    yield row("train", what, NAME, PROMPT_TOKENS, seconds, "ours", "plain", limit=GENERATION_BAR)
