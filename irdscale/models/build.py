"""The pretrained model of a run, with a head that fits the task, and its tokenizer."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from irdscale.config.schema import LANGUAGE_KINDS, ModelConfig, RunConfig, nearest
from irdscale.distributed.deepspeed import gathering_options, loading, zero_settings, zero_stage
from irdscale.distributed.zero3 import gather_by, gathering, is_partitioned, shape_of
from irdscale.errors import InputError
from irdscale.models.checks import padding_matters, uneven_rows
from irdscale.models.classes import HeadClasses, are_placeholders, names_of
from irdscale.models.quantize import after_loading, quantizing
from irdscale.utils.hub import hub_access, is_hub_id, one_line, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from irdscale.tasks.task import Task

PACKAGE = "package:"
# Of the longer of two texts that a model is tried on, on the processor.
TRIED_TOKENS = 16
T = TypeVar("T")


def resolve_model_path(path: str) -> str:
    """The folder that `model.path` names, or `path` itself where it is a hub id.

    `package:NAME/FOLDER` is a folder inside an installed Python package, found without importing it.

    Raises:
        InputError: no such package or folder, or the folder holds no model.
    """
    if path.startswith(PACKAGE):
        return str(_in_package(path))
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model.path: {path}: not a model folder: found no config.json")
        return str(folder)
    if folder.exists():
        raise InputError(f"model.path: {path}: found a file; expected a model folder or a hub id")
    if not is_hub_id(path):
        raise InputError(f"model.path: {path}: no such folder")
    return path


def _in_package(path: str) -> Path:
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    # A dotted name would import its parents.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        underscored = name.replace("-", "_")
        hint = f' (did you mean "{underscored}"?)' if underscored != name else "; expected an installed one"
        raise InputError(f"model.path: {path}: found no Python package {name!r}{hint}")
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    for root in roots:
        if (root / inside / "config.json").is_file():
            return root / inside
    folders = sorted(
        str(file.parent.relative_to(root)) for root in roots for file in root.rglob("config.json") if _is_model(file)
    )
    there = ", ".join(f"{PACKAGE}{name}/{folder}" for folder in folders) or "there is none in the package"
    raise InputError(f"model.path: {path}: found no config.json{nearest(inside, folders)}; models: {there}")


def _is_model(file: Path) -> bool:
    try:
        return "model_type" in json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False


def _load(path: str, what: str, load: Callable[..., T], kind: str = "model", **options: Any) -> T:
    """Call a `from_pretrained`, turning whatever it raises into one line."""
    resolved = resolve_model_path(path)
    remote = not Path(resolved).is_dir()
    try:
        with hub_access(needed=remote), quiet():
            return load(resolved, **options)
    except Exception as error:  # transformers, safetensors and the hub's errors have no common class
        text = str(error)
        if "trust_remote_code" in text:
            raise InputError(
                f"model.path: {path}: comes with Python code of its own; set model.trust_remote_code=true to run it"
            ) from error
        if "Unrecognized configuration class" in text:
            raise InputError(f"model.path: {path}: transformers has no {kind} for this kind of model") from error
        problem = f"no such folder here, and no {what} loaded from the hub" if remote else f"cannot load the {what}"
        raise InputError(f"model.path: {path}: {problem}: {one_line(error)}") from error


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """The model's own configuration.

    Raises:
        InputError: `model.path` names no model.
    """
    from transformers import AutoConfig

    return _load(model.path, "model", AutoConfig.from_pretrained, trust_remote_code=model.trust_remote_code)


def trained_head(model: ModelConfig, config: PretrainedConfig) -> HeadClasses | None:
    """What the head of a checkpoint tells apart; None where the head would be a new one. Reads no weights.

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
    """Whether a checkpoint holds every parameter that `build_model` would put on top of the pretrained ones.

    Args:
        otherwise: the answer where its files, or its code, do not tell.
    """
    from transformers import AutoModelForSequenceClassification

    held = _held_parameters(model.path)
    if held is None:
        return otherwise
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), quiet():
            empty = AutoModelForSequenceClassification.from_config(config, trust_remote_code=model.trust_remote_code)
    except Exception:  # a model's own code may refuse anything that is not loading, which tells what is wrong
        return otherwise
    base = empty.base_model_prefix + "."
    head = {name for name, _ in empty.named_parameters() if not name.startswith(base)}
    return bool(head) and head <= held


def _held_parameters(path: str) -> set[str] | None:
    """Names of the parameters in a checkpoint; None where its files are of another format."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

    try:
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
            file = _checkpoint_file(path, name)
            if file is None:
                continue
            if name.endswith(".json"):
                return set(json.loads(Path(file).read_bytes())["weight_map"])
            if name == SAFE_WEIGHTS_NAME:
                with safe_open(file, framework="pt") as held:
                    return set(held.keys())
            return set(torch.load(file, map_location="meta", weights_only=True))
    except Exception:  # a damaged file is refused where the model is loaded
        return None
    return None


def _checkpoint_file(path: str, name: str) -> str | None:
    from transformers.utils import cached_file

    resolved = resolve_model_path(path)
    remote = not Path(resolved).is_dir()
    with hub_access(needed=remote), quiet():
        return cached_file(
            resolved,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right; one without a pad token pads with its end-of-sequence token.

    Raises:
        InputError: there is no tokenizer, or it has neither of these tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = _load(model.path, "tokenizer", AutoTokenizer.from_pretrained, trust_remote_code=model.trust_remote_code)
    # Without tokenizer files, transformers makes up a tokenizer of special tokens only.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise InputError(f"model.path: {model.path}: found no tokenizer beside the model; expected its files there")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"model.path: {model.path}: the tokenizer has neither a pad token nor an end-of-sequence token; "
                f"expected one of them, for padding"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def build_model(config: RunConfig, task: Task, seed: int) -> tuple[PreTrainedModel, list[str]]:
    """Load `config.model` for `task`: with a head for its classes or values, or as a causal language model.

    Where the tokenizer came with padding on the left and the model needs it there (XLNet), the task's pads there.

    Args:
        seed: of the head's initial weights; equal seeds give equal heads. The global random state is left alone. With
            ZeRO-3 in `train.deepspeed` the weights are loaded straight into partitions, and the call is collective.

    Returns:
        The model, in eval mode on the CPU (a language model on the GPU, where there is one), and the names of the
        parameters that the checkpoint does not hold.

    Raises:
        InputError: the checkpoint is missing or damaged or does not fit the task, or `task.max_length` or the
            tokenizer does not fit the model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    language = task.kind in LANGUAGE_KINDS
    loader: Any = AutoModelForCausalLM if language else AutoModelForSequenceClassification
    own = None if language or config.model.quantize is None else load_model_config(config.model)
    quantized = quantizing(config, own, loader)
    with torch.random.fork_rng(devices=[]), loading(config):
        torch.manual_seed(seed)
        model, info = _load(
            config.model.path,
            "model",
            loader.from_pretrained,
            "causal language model" if language else "sequence classification",
            dtype=getattr(torch, config.model.dtype),
            trust_remote_code=config.model.trust_remote_code,
            # Refused below, with the names and shapes that transformers leaves out of its error.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **(_straight_to_gpu(config) if language else _head_options(task)),
            **quantized,
        )
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
    """Have a classifier's texts padded on the tokenizer's own side where what it makes of them depends on it."""
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
    """Have a checkpoint read onto this rank's GPU, where there is one, instead of main memory first.

    Not with a new head, which would be drawn by the GPU's random numbers. ZeRO-3 loads into partitions.
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
    """Names of the matrices in a language model's decoder blocks: all its linear layers but the head, no embedding.

    Raises:
        InputError: its blocks are not found.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    blocks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers and not _inside(name, "experts")
    ]
    names = [
        name
        for name, parameter in model.named_parameters()
        if len(shape_of(parameter)) > 1 and any(name.startswith(f"{block}.") for block in blocks)
    ]
    if not names:
        raise InputError(
            f"fisher.include: found none, and no list of {layers} blocks in {type(model).__name__}; "
            f"expected expressions for the parameters to score"
        )
    return names


def _inside(name: str, part: str) -> bool:
    return part in name.split(".")


def _check_checkpoint(path: str, model: PreTrainedModel, info: dict[str, Any], whole: bool) -> None:
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise InputError(
            f"model.path: {path}: {name} has shape {list(found)} in the checkpoint; expected {list(expected)} "
            f"(a head trained for another task does not fit this one)"
        )
    parameters = dict(model.named_parameters())
    base = model.base_model_prefix + "."
    # A pooler is legitimately absent from masked-language checkpoints; anything else would be random.
    absent = [
        name
        for name in sorted(info["missing_keys"])
        if name in parameters and (whole or (name.startswith(base) and ".pooler." not in name))
    ]
    if absent:
        raise InputError(
            f"model.path: {path}: the checkpoint lacks {len(absent)} pretrained parameters, such as {absent[0]}"
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
        raise InputError(f"task.max_length: found {max_length}; expected at most {limit}, the model's positions")


def _check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    rows = shape_of(model.get_input_embeddings().weight)[0]  # type: ignore[arg-type]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"model.path: {path}: the tokenizer has token {largest}, but the model's embedding has {rows} rows; "
            f"expected a tokenizer of this model"
        )
