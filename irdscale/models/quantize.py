"""Loading of a base with quantised linear layers (`model.quantize`): options for transformers, and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from irdscale.config.schema import RunConfig
from irdscale.distributed.deepspeed import zero_stage
from irdscale.errors import InputError
from irdscale.models.quantized import adopt, quantized_linears

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def quantizing(config: RunConfig, model_config: PretrainedConfig | None, auto: Any) -> dict[str, Any]:
    """Options for `from_pretrained` that quantise the linear layers as they are loaded; empty without `model.quantize`.

    A language model's output embeddings are not quantised, nor are a classifier's head and pooler, which a checkpoint
    may lack.

    Args:
        model_config: the model's own configuration; needed for a classifier only.
        auto: transformers class that loads the model.

    Raises:
        InputError: bitsandbytes is missing, or the configuration uses ZeRO-3.
    """
    kind = config.model.quantize
    if kind is None:
        return {}
    refuse_zero3(config, zero_stage(config))
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"found {kind}, but no usable bitsandbytes ({error})",
            "it: pip install 'irdscale[quantize]'",
            key="model.quantize",
        ) from error
    from transformers import BitsAndBytesConfig

    skipped = None if model_config is None else _outside(model_config, auto, config.model.trust_remote_code)
    if kind == "int8":
        # No outlier columns: the input of a product is not rounded to 8 bits.
        made = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=skipped)
    else:
        made = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, config.model.dtype),
            llm_int8_skip_modules=skipped,
        )
    options: dict[str, Any] = {"quantization_config": made}
    if model_config is not None:
        # A new head is initialised by the CPU's random numbers, on a machine with a GPU too.
        options["device_map"] = {"": "cpu"}
    return options


def refuse_zero3(config: RunConfig, stage: int | None) -> None:
    """Refuse a quantised base with ZeRO-3.

    Args:
        stage: ZeRO stage of the configuration's DeepSpeed file; None without one.

    Raises:
        InputError: the base is quantised, and the stage is 3.
    """
    if config.model.quantize is not None and stage == 3:
        found = (
            f"found {config.model.quantize} with ZeRO-3 ({config.train.deepspeed}), which partitions only float weights"
        )
        raise InputError(found, "ZeRO 0-2, or none: each rank holds the full quantised base", key="model.quantize")


def _outside(model_config: PretrainedConfig, auto: Any, trusted: bool) -> list[str]:
    """Names of the linear layers that a checkpoint of the base may lack."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            empty = auto.from_config(model_config, trust_remote_code=trusted)
    except Exception:  # the error is raised when the model is loaded
        return []
    return linears_outside(empty)


def linears_outside(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that are not quantised: heads and poolers."""
    base = f"{model.base_model_prefix}."
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in names if not name.startswith(base) or ".pooler." in name]


def after_loading(config: RunConfig, model: PreTrainedModel) -> None:
    """Make a model loaded with `quantizing` compute with its dequantised weights; other models are unchanged.

    Raises:
        InputError: no layer was quantised.
    """
    if config.model.quantize is None:
        return
    if next(quantized_linears(model), None) is None:
        raise InputError(
            f"found {config.model.quantize} with {type(model).__name__}, which has no linear layer in its base",
            "a model with linear layers",
            key="model.quantize",
        )
    adopt(model)
