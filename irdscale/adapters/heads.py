"""The classes of a model's head: stored in an adapter, compared with a base model's, and set on the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from irdscale.adapters.hub import find_adapter
from irdscale.errors import InputError
from irdscale.models.classes import HeadClasses, are_placeholders, names_of, order_of, other_classes
from irdscale.sparse.model import sparse_state
from irdscale.utils.files import read_json

_KINDS = {
    "single_label_classification": "sequence-classification",
    "multi_label_classification": "multi-label-classification",
    "regression": "regression",
}
_KEPT = ("id2label", "label2id", "problem_type")


def head_of(model: nn.Module, changed: Mapping[str, Any] | None = None) -> HeadClasses | None:
    """A model's kind of task and classes; None if its class and configuration do not tell.

    Args:
        changed: values of its configuration before an adapter was loaded.
    """
    model = getattr(model, "_orig_mod", model)
    name, config = getattr(type(model), "_original", type(model)).__name__, getattr(model, "config", None)
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return HeadClasses(name, "causal-lm", ())
    if config is None or not name.endswith("ForSequenceClassification"):
        return None
    own = SimpleNamespace(**{key: getattr(config, key, None) for key in _KEPT} | dict(changed or {}))
    names = names_of(own)
    kind = "regression" if len(names) == 1 else _KINDS.get(str(own.problem_type))
    return HeadClasses(name, kind, () if kind == "regression" else names)


def head_in_words(head: HeadClasses | None) -> dict[str, Any] | None:
    """A head's description in adapter.json."""
    return None if head is None else {"kind": head.kind, "classes": list(head.names)}


def read_head(stored: Any, folder: Path) -> HeadClasses | None:
    """Read the description that `head_in_words` wrote; None if the model had none.

    Raises:
        InputError: the description is damaged.
    """
    if stored is None:
        return None
    kind, names = (stored.get("kind"), stored.get("classes")) if isinstance(stored, dict) else (0, None)
    if not isinstance(kind, str | None) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"damaged adapter: found head {stored!r}", "kind and classes", where=folder / "adapter.json")
    return HeadClasses(f"the adapter {folder}", kind, tuple(names))


def adapter_head(folder: Path | str) -> HeadClasses | None:
    """The classes of an adapter's head, without reading its tensors.

    Args:
        folder: adapter folder, or `OWNER/NAME` on the Hugging Face hub.

    Raises:
        InputError: there is no adapter, or the description of its head is damaged.
    """
    folder = find_adapter(folder)
    meta = read_json(folder / "adapter.json", "adapter")
    head, counted = read_head(_value(meta, "head"), folder), _value(_value(meta, "config"), "counted")
    if head is None:
        return None
    return replace(head, counted=tuple(map(str, counted)) if isinstance(counted, list) else head.names)


def adapter_seed(folder: Path) -> int | None:
    """The seed of an adapter's training, by which a new head was initialised; None if unknown."""
    seed = _value(_value(read_json(folder / "adapter.json", "adapter"), "config"), "seed")
    return seed if isinstance(seed, int) else None


def _value(stored: Any, key: str) -> Any:
    return stored.get(key) if isinstance(stored, dict) else None


def check_head(model: nn.Module, head: HeadClasses | None, changed: Mapping[str, Any] | None = None) -> None:
    """Check that a base model's kind of task and classes are the adapter's, as far as both are known.

    Args:
        changed: see `head_of`.

    Raises:
        InputError: the kinds of task or the classes differ.
    """
    own = head_of(model, changed)
    if head is None or own is None:
        return
    if own.kind is not None and head.kind is not None and own.kind != head.kind:
        raise InputError(f"found a model for {own.kind}", f"one for {head.kind}, as {head.where}", where=own.where)
    if own.names and head.names and order_of(own.names, head.names) is None:
        raise other_classes(own.names, head, own.where)


def put_head(model: nn.Module, head: HeadClasses | None) -> None:
    """Give a sparse model the class names of its adapter; `irdscale.unload` restores its own."""
    own, config = head_of(model), getattr(model, "config", None)
    if head is None or own is None or config is None:
        return
    state = sparse_state(model)
    state.head_before = state.head_before or {key: getattr(config, key, None) for key in _KEPT}
    if head.names and not are_placeholders(head.names) and len(own.names) == len(head.names):
        config.id2label = dict(enumerate(head.names))
        config.label2id = {name: number for number, name in enumerate(head.names)}
    if getattr(config, "problem_type", None) is None and head.kind in _KINDS.values():
        config.problem_type = next(key for key, kind in _KINDS.items() if kind == head.kind)
