"""Tiny models on quantised bases, and the dense models that they stand for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.models.quantized import make_plain

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (irdscale[quantize])"
)
KINDS = ("nf4", "int8")


def saved(folder: Path, family: str = "llama", head: str = "lm", **more: Any) -> Path:
    """A random float32 model with a few thousand parameters, saved like a pretrained one."""
    from tests.tiny_models import tiny

    sizes = {"hidden_size": 32, "intermediate_size": 48} if family != "gpt2" else {"n_embd": 32}
    tiny(family, head, **sizes | more).float().save_pretrained(folder)
    return folder


def loaded(folder: Path, kind: str, dtype: torch.dtype = torch.float32, head: str = "lm") -> Any:
    """The saved model as transformers loads it with bitsandbytes."""
    import transformers

    options: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    auto: Any = transformers.AutoModelForCausalLM
    if head != "lm":
        auto = transformers.AutoModelForSequenceClassification
        options["llm_int8_skip_modules"] = ["score", "classifier"]
    made = transformers.BitsAndBytesConfig(**options)
    return auto.from_pretrained(folder, quantization_config=made, dtype=dtype).eval()


def dense(folder: Path, kind: str, dtype: torch.dtype = torch.float32, head: str = "lm") -> Any:
    """The plain model of the dequantised weights, trainable."""
    return make_plain(loaded(folder, kind, dtype, head)).requires_grad_(True)
