"""A model's sizes from its config.json alone: the model is built on the meta device, without bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from irdscale.config.kinds import LANGUAGE_KINDS, Kind
from irdscale.config.schema import RunConfig
from irdscale.distributed.zero3 import numel_of, shape_of
from irdscale.errors import InputError
from irdscale.fisher import pool
from irdscale.memory.quantized import base_bytes, quantize_on_meta
from irdscale.memory.sizes import Shapes
from irdscale.models.build import load_model_config
from irdscale.sparse import matching_parameters
from irdscale.tasks.glue import GLUE
from irdscale.utils.hub import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def task_kind(config: RunConfig) -> Kind:
    """The task's kind, without loading its data.

    Raises:
        InputError: `task.kind` is not set, and the data set is not in GLUE.
    """
    if config.task.kind is not None:
        return config.task.kind
    name = config.task.dataset.rstrip("/").rpartition("/")[2]
    if name in GLUE:
        return GLUE[name].kind
    raise InputError("found none", "a kind, because the data set is not in GLUE", key="task.kind")


def meta_model(config: RunConfig) -> PreTrainedModel:
    """The task's model on the meta device, in evaluation mode.

    Raises:
        InputError: `model.path` names no model, or transformers cannot build it for this kind of task.
    """
    import transformers

    kind, model_config = task_kind(config), load_model_config(config.model)
    auto: Any = transformers.AutoModelForSequenceClassification
    if kind in LANGUAGE_KINDS:
        auto = transformers.AutoModelForCausalLM
    else:
        # The number of classes is unknown, and too small to matter.
        model_config.num_labels = 1 if kind == "regression" else 2
        text = model_config.get_text_config()
        if text.pad_token_id is None:
            text.pad_token_id = model_config.pad_token_id = 0
    try:
        with torch.device("meta"):
            model = auto.from_config(
                model_config,
                dtype=getattr(torch, config.model.dtype),
                trust_remote_code=config.model.trust_remote_code,
            )
    except Exception as error:  # transformers and remote code raise any type
        raise InputError(
            f"cannot build a model for task.kind {kind!r} from its config.json: {one_line(error)}",
            key="model.path",
            where=config.model.path,
        ) from error
    if config.model.quantize is not None:
        quantize_on_meta(model, config.model.quantize)
    return cast("PreTrainedModel", model.eval())


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the stack of equal layers: the list of modules with the most parameters.

    Raises:
        InputError: the model has no list of modules.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError("found no list of layers", "a model of layers", where=type(model).__name__)
    # Among equals the first: the decoder's own list, not one inside a layer.
    return max(lists, key=lambda item: (sum(map(numel_of, item[1].parameters())), len(item[1])))


def trained_outside(config: RunConfig, model: PreTrainedModel) -> list[str]:
    """Names of the parameters trained outside the mask; `auto` means a classifier's head, and none of a language model.

    Raises:
        InputError: an expression of `train.always_train` matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    if config.train.always_train != "auto":
        return matching_parameters(names, config.train.always_train)
    if task_kind(config) in LANGUAGE_KINDS:
        return []
    return [name for name in names if not name.startswith(f"{model.base_model_prefix}.")]


def scored_of(config: RunConfig, model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that a mask may hold entries of, as in a Fisher pass.

    Raises:
        InputError: an expression of `fisher.include` or `fisher.exclude` is malformed, or no parameter is left.
    """
    return pool.scored_of(config, model, trained_outside(config, model), task_kind(config) in LANGUAGE_KINDS)


def shapes_of(config: RunConfig, model: PreTrainedModel) -> Shapes:
    """The sizes of a model on the meta device.

    Raises:
        InputError: as `scored_of` and `layer_stack`.
    """
    from transformers.pytorch_utils import Conv1D

    parameters = dict(model.named_parameters())
    products = [shape_of(cast(Tensor, m.weight)) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    text = model.config.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", 0) or 0, getattr(text, "hidden_size", 0) or 0
    width = getattr(text, "head_dim", None) or hidden // max(1, heads)
    return Shapes(
        parameters=sum(map(numel_of, parameters.values())),
        item=getattr(torch, config.model.dtype).itemsize,
        scored={name: shape_of(p) for name, p in scored_of(config, model).items()},
        dense=sum(numel_of(parameters[name]) for name in trained_outside(config, model)),
        products=[(out, inside) for out, inside in products],
        largest=max(map(numel_of, parameters.values())),
        layer=max(sum(map(numel_of, layer.parameters())) for layer in layer_stack(model)[1]),
        hidden=hidden,
        layers=len(layer_stack(model)[1]),
        attention=heads * width,
        causal=any(getattr(module, "is_causal", False) for module in model.modules()),
        positions=getattr(text, "max_position_embeddings", None),
        quantized=None if config.model.quantize is None else base_bytes(model),
    )
