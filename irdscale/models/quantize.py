"""Loading a base with quantised linear layers (`model.quantize`): what transformers is asked for, what is refused."""

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
    """Options for `from_pretrained` that quantise the linear layers as they are read; none without `model.quantize`.

    A language model's output embeddings stay as they are, and so do a classifier's head and pooler, which a checkpoint
    need not hold.

    Args:
        model_config: the model's own configuration; asked for a classifier alone.
        auto: the transformers class that loads it.

    Raises:
        InputError: bitsandbytes is missing, or the configuration keeps the base in ZeRO-3 partitions.
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
        # A threshold would keep some columns of the input apart; the product takes no 8-bit input anyway.
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
        # A new head is drawn by the CPU's random numbers, where there is a GPU too.
        options["device_map"] = {"": "cpu"}
    return options


def refuse_zero3(config: RunConfig, stage: int | None) -> None:
    """Refuse a quantised base in partitions.

    Args:
        stage: ZeRO stage of the configuration's DeepSpeed file; None without one.

    Raises:
        InputError: there would be one.
    """
    if config.model.quantize is not None and stage == 3:
        raise InputError(
            f"found {config.model.quantize} with ZeRO-3 ({config.train.deepspeed}), which takes float weights alone",
            "ZeRO 0-2, or none: each rank holds the whole quantised base",
            key="model.quantize",
        )


def _outside(model_config: PretrainedConfig, auto: Any, trusted: bool) -> list[str]:
    """Names of the linear layers that a checkpoint of the base need not hold."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            empty = auto.from_config(model_config, trust_remote_code=trusted)
    except Exception:  # loading tells what is wrong
        return []
    return linears_outside(empty)


def linears_outside(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that are not quantised: heads, and a pooler."""
    base = f"{model.base_model_prefix}."
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in names if not name.startswith(base) or ".pooler." in name]


def after_loading(config: RunConfig, model: PreTrainedModel) -> None:
    """Have a model that was loaded with `quantizing` compute by its dequantised weights; any other is left alone.

    Raises:
        InputError: no layer of it was quantised.
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
