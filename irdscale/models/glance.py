"""What a model's files say before it is loaded: kind, size, longest text, chat template. Imports nothing heavy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from irdscale.models.places import is_gguf, resolve_model_path

ModelKind = Literal["encoder", "decoder", "encoder-decoder", "unknown"]
_ENCODERS = frozenset(
    [
        "albert",
        "bert",
        "camembert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "eurobert",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "roberta",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
    ]
)
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Glance:
    """A model by its files.

    Attributes:
        where: value for `model.path`.
        kind: unknown for a model on the hub.
        parameters: number of parameters, about; None if unknown.
        positions: most tokens of a text; None if unknown.
        has_tokenizer, has_chat_template: whether the folder holds them.
    """

    where: str
    kind: ModelKind
    parameters: int | None = None
    positions: int | None = None
    has_tokenizer: bool = False
    has_chat_template: bool = False


def glance(path: str) -> Glance:
    """Read the files of a model; a model on the hub is not asked for.

    Raises:
        InputError: as `resolve_model_path`.
    """
    resolved = resolve_model_path(path)
    place = Path(resolved)
    where = path if path.startswith("package:") or not place.exists() else str(place.resolve())
    if is_gguf(resolved):
        size = place.stat().st_size if place.is_file() else 0
        # Most files have four to five bits a weight.
        return Glance(where, "decoder", round(size / 0.6) or None)
    if not place.is_dir():
        return Glance(where, "unknown")
    config = _json(place / "config.json")
    text = config.get("text_config")
    inner = {**config, **text} if isinstance(text, dict) else config
    return Glance(
        where,
        _kind(config),
        _parameters(place, inner),
        next(
            (inner[key] for key in ("max_position_embeddings", "n_positions") if isinstance(inner.get(key), int)), None
        ),
        any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")),
        (place / "chat_template.jinja").is_file() or bool(_json(place / "tokenizer_config.json").get("chat_template")),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(config: dict[str, Any]) -> ModelKind:
    names = " ".join(map(str, config.get("architectures") or ()))
    if config.get("is_encoder_decoder"):
        return "encoder-decoder"
    if config.get("model_type") in _ENCODERS and not config.get("is_decoder"):
        return "encoder"
    if "CausalLM" in names or "LMHeadModel" in names or "hidden_size" in config or "n_embd" in config:
        return "encoder" if "MaskedLM" in names else "decoder"
    return "unknown"


def _parameters(place: Path, config: dict[str, Any]) -> int | None:
    """Number of parameters by the size of the weights; by the shapes of a usual decoder if there are none."""
    sizes = [file.stat().st_size for kind in ("*.safetensors", "pytorch_model*.bin") for file in place.glob(kind)]
    if sizes:
        return sum(sizes) // (2 if config.get("dtype", config.get("torch_dtype")) in _HALF else 4)
    width, depth = config.get("hidden_size"), config.get("num_hidden_layers")
    if not isinstance(width, int) or not isinstance(depth, int):
        return None
    return 12 * depth * width**2 + int(config.get("vocab_size") or 0) * width
