"""Load a run's pretrained model, with a head for the task, and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.config.schema import ModelConfig, RunConfig
from irdscale.distributed.deepspeed import gathering_options, loading, zero_settings, zero_stage
from irdscale.distributed.zero3 import gather_by, gathering, is_partitioned, shape_of
from irdscale.errors import InputError
from irdscale.models.checks import padding_matters, uneven_rows
from irdscale.models.classes import HeadClasses, are_placeholders, names_of
from irdscale.models.dequantised import checkpoint_folder, settings_folder
from irdscale.models.places import WEIGHT_FILES, is_gguf, resolve_model_path
from irdscale.models.quantize import after_loading, quantizing
from irdscale.utils.hub import hub_access, one_line, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from irdscale.tasks.task import Task

# Most tokens of the texts on which the effect of padding is tried.
TRIED_TOKENS = 16
T = TypeVar("T")


def _source(model: ModelConfig, weights: bool = False) -> str:
    """The folder or hub id to load a model from; for a GGUF file its cached checkpoint.

    Args:
        weights: whether weights are loaded, not only configuration and tokenizer.

    Raises:
        InputError: `model.path` names no model, or a GGUF file that cannot be read.
        RunError: the dequantised model cannot be written.
    """
    resolved = resolve_model_path(model.path)
    if not is_gguf(resolved):
        return resolved
    return str(checkpoint_folder(model.path, model.dtype) if weights else settings_folder(model.path))


def _load(path: str, place: str, what: str, load: Callable[..., T], kind: str = "model", **options: Any) -> T:
    """Call a `from_pretrained`, and turn its errors into one line.

    Args:
        path: `model.path`, for errors.
        place: result of `_source`.
    """
    remote = not Path(place).is_dir()
    try:
        with hub_access(needed=remote), quiet():
            return load(place, **options)
    except Exception as error:  # transformers, safetensors and the hub's errors have no common class
        text = str(error)
        if "trust_remote_code" in text:
            raise InputError(
                f"{path}: comes with Python code of its own; set model.trust_remote_code=true to run it",
                key="model.path",
            ) from error
        if "Unrecognized configuration class" in text:
            raise InputError(f"{path}: transformers has no {kind} for this kind of model", key="model.path") from error
        problem = f"no such folder here, and no {what} loaded from the hub" if remote else f"cannot load the {what}"
        raise InputError(f"{path}: {problem}: {one_line(error)}", key="model.path") from error


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """The model's own configuration.

    Raises:
        InputError: `model.path` names no model.
    """
    from transformers import AutoConfig

    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    return _load(model.path, _source(model), "model", AutoConfig.from_pretrained, **options)


def trained_head(model: ModelConfig, config: PretrainedConfig) -> HeadClasses | None:
    """Classes of a checkpoint's head; None if the task would need a new head. Reads no weights.

    Args:
        config: the model's own configuration.

    Raises:
        InputError: the checkpoint's configuration contradicts itself.
    """
    names = names_of(config)
    named = any(
        str(name).endswith("ForSequenceClassification") for name in getattr(config, "architectures", None) or []
    )
    if len(names) < 2 or (are_placeholders(names) and not named) or not _has_head(model, config, named):
        return None
    return HeadClasses("the checkpoint's head", None, names_of(config, f"model.path: {model.path}: config.json"))


def _has_head(model: ModelConfig, config: PretrainedConfig, otherwise: bool) -> bool:
    """Whether a checkpoint holds every parameter of the head that `build_model` would make.

    Args:
        otherwise: result if neither its files nor its code tell.
    """
    from transformers import AutoModelForSequenceClassification

    held = _held_parameters(_source(model))
    if held is None:
        return otherwise
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), quiet():
            empty = AutoModelForSequenceClassification.from_config(config, trust_remote_code=model.trust_remote_code)
    except Exception:  # remote code may refuse this; loading the model gives the error
        return otherwise
    base = empty.base_model_prefix + "."
    head = {name for name, _ in empty.named_parameters() if not name.startswith(base)}
    return bool(head) and head <= held


def _held_parameters(place: str) -> set[str] | None:
    """Names of the parameters in a checkpoint; None if its files have an unknown format."""
    from safetensors import safe_open

    try:
        for name in WEIGHT_FILES:
            file = _checkpoint_file(place, name)
            if file is None:
                continue
            if name.endswith(".json"):
                return set(json.loads(Path(file).read_bytes())["weight_map"])
            if name.endswith(".safetensors"):
                with safe_open(file, framework="pt") as held:
                    return set(held.keys())
            return set(torch.load(file, map_location="meta", weights_only=True))
    except Exception:  # loading the model refuses a damaged file
        return None
    return None


def _checkpoint_file(place: str, name: str) -> str | None:
    from transformers.utils import cached_file

    remote = not Path(place).is_dir()
    with hub_access(needed=remote), quiet():
        return cached_file(
            place,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with padding on the right, by the end-of-sequence token if it has no pad token.

    Raises:
        InputError: there is no tokenizer, or it has neither token.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    tokenizer = _load(model.path, _source(model), "tokenizer", AutoTokenizer.from_pretrained, **options)
    # Without tokenizer files, transformers makes a tokenizer of special tokens only.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise InputError(f"{model.path}: found no tokenizer beside the model", "its files there", key="model.path")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"{model.path}: the tokenizer has neither a pad token nor an end-of-sequence token",
                "one of them, for padding",
                key="model.path",
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def build_model(config: RunConfig, task: Task, seed: int) -> tuple[PreTrainedModel, list[str]]:
    """Load `config.model` for `task`: with a head for its classes or values, or as a causal language model.

    With ZeRO-3 in `train.deepspeed`, weights are loaded directly into partitions, and the call is collective. The
    task's tokenizer pads on the left if that is its default and the model needs it (XLNet).

    Args:
        seed: seed of the head's initial weights; the global random state does not change.

    Returns:
        The model, in evaluation mode on the CPU (a language model on the GPU, if there is one), and the names of the
        parameters that are not in the checkpoint.

    Raises:
        InputError: the checkpoint is missing, damaged or for another task; or `task.max_length` or the tokenizer does
            not fit the model.
        RunError: the weights of a GGUF file cannot be written to the cache.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    language = task.kind in LANGUAGE_KINDS
    loader: Any = AutoModelForCausalLM if language else AutoModelForSequenceClassification
    # A GGUF file is dequantised before weights are partitioned.
    place = _source(config.model, weights=True)
    own = None if language or config.model.quantize is None else load_model_config(config.model)
    quantized = quantizing(config, own, loader)
    with torch.random.fork_rng(devices=[]), loading(config):
        torch.manual_seed(seed)
        model, info = _load(
            config.model.path,
            place,
            "model",
            loader.from_pretrained,
            "causal language model" if language else "sequence classification",
            dtype=getattr(torch, config.model.dtype),
            trust_remote_code=config.model.trust_remote_code,
            # `_check_checkpoint` refuses them, and names them with their shapes.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **(_straight_to_gpu(config) if language else _head_options(task)),
            **quantized,
        )
    if is_gguf(config.model.path):
        # Adapters and model cards name the user's path, not the cache.
        model.config.name_or_path = model.name_or_path = config.model.path
    after_loading(config, model)
    _check_checkpoint(config.model.path, model, info, language)
    _check_positions(config.task.max_length, model)
    _check_vocabulary(config.model.path, task.tokenizer, model)
    settings = zero_settings(config)
    if settings is not None and is_partitioned(model):
        hidden = getattr(model.config.get_text_config(), "hidden_size", 0) or 0
        gather_by(model, gathering_options(settings["zero_optimization"], hidden))
    for part in (model.config, model.config.get_text_config()):
        part.pad_token_id = task.tokenizer.pad_token_id
    missing = set(info["missing_keys"])
    model.eval()
    if not language:
        _keep_padding_side(model, task)
    return model, [name for name, _ in model.named_parameters() if name in missing]


def _keep_padding_side(model: PreTrainedModel, task: Task) -> None:
    """Keep a tokenizer's default padding on the left if a classifier's results depend on the side."""
    tokenizer: Any = task.tokenizer
    if tokenizer.init_kwargs.get("padding_side", type(tokenizer).padding_side) != "left":
        return
    tokenizer.padding_side = "right"
    rows = uneven_rows(task.train, task.collate, longest=TRIED_TOKENS)
    with gathering(model):
        if padding_matters(model, task.collate, rows):
            tokenizer.padding_side = "left"
            if padding_matters(model, task.collate, rows):
                tokenizer.padding_side = "right"


def _straight_to_gpu(config: RunConfig) -> dict[str, Any]:
    """Options to read a checkpoint directly onto this rank's GPU, if there is one.

    They would draw a new head from the GPU's random numbers, so models with heads load on the CPU. ZeRO-3 loads into
    partitions.
    """
    if not torch.cuda.is_available() or zero_stage(config) == 3:
        return {}
    return {"device_map": {"": torch.cuda.current_device()}}


def _head_options(task: Task) -> dict[str, Any]:
    names = task.label_names or ["value"]
    return {
        "num_labels": task.num_labels,
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "regression" if task.kind == "regression" else "single_label_classification",
    }


def decoder_linears(model: PreTrainedModel) -> list[str]:
    """Names of the matrices in a language model's decoder blocks: no head, no embedding.

    Raises:
        InputError: the blocks are not found.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    blocks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers and not _has_part(name, "experts")
    ]
    names = [
        name
        for name, parameter in model.named_parameters()
        if len(shape_of(parameter)) > 1 and any(name.startswith(f"{block}.") for block in blocks)
    ]
    if not names:
        raise InputError(
            f"found none, and no list of {layers} blocks in {type(model).__name__}",
            "expressions for the parameters to score",
            key="fisher.include",
        )
    return names


def _has_part(name: str, part: str) -> bool:
    return part in name.split(".")


def _check_checkpoint(path: str, model: PreTrainedModel, info: dict[str, Any], language: bool) -> None:
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise InputError(
            f"{path}: {name} has shape {list(found)} in the checkpoint",
            f"{list(expected)} (a head trained for another task does not fit this one)",
            key="model.path",
        )
    parameters = dict(model.named_parameters())
    base = model.base_model_prefix + "."
    # Masked language models have no pooler. Other missing parameters would be random.
    absent = [
        name
        for name in sorted(info["missing_keys"])
        if name in parameters and (language or (name.startswith(base) and ".pooler." not in name))
    ]
    if absent:
        raise InputError(
            f"{path}: the checkpoint lacks {len(absent)} pretrained parameters, such as {absent[0]}", key="model.path"
        )


def _check_positions(max_length: int, model: PreTrainedModel) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit <= 0:
        return
    for name, module in model.named_modules():
        # RoBERTa's positions begin after the padding index.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1
            break
    if max_length > limit:
        raise InputError(f"found {max_length}", f"at most {limit}, the model's positions", key="task.max_length")


def _check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    rows = shape_of(model.get_input_embeddings().weight)[0]  # type: ignore[arg-type]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"{path}: the tokenizer has token {largest}, but the model's embedding has {rows} rows",
            "a tokenizer of this model",
            key="model.path",
        )
