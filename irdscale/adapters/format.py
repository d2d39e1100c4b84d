"""Adapter folders: the k deltas, their indices, and the base model that they belong to; saved, loaded and switched."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.adapters.base import is_vouched, known_hash
from irdscale.adapters.card import model_card
from irdscale.adapters.heads import check_head, head_in_words, head_of, put_head, read_head
from irdscale.adapters.hub import find_adapter
from irdscale.distributed.ranks import failing_together, rank_and_world
from irdscale.distributed.zero3 import shape_of
from irdscale.errors import InputError
from irdscale.masks.mask import Mask, index_dtype
from irdscale.models.classes import HeadClasses
from irdscale.sparse.model import (
    base_hash,
    hash_tensor,
    is_sparse,
    set_trained_numbers,
    sparse_state,
    sparsify,
    trained_numbers,
    unload,
)
from irdscale.utils.files import read_tensors, read_versioned, write_atomic, write_folder, write_json

FORMAT = "irdscale-adapter"
VERSION = 1
STORED = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Adapter:
    """Contents of an adapter folder, checked against its own hashes.

    Attributes:
        folder: the folder.
        mask: the trained entries.
        values: name -> deltas of that parameter's entries, in their stored type.
        dense: name -> densely trained parameter.
        base_hash: hash of the base that it belongs to, without the densely trained parameters.
        base_model: name of that base, for the reader; may be empty.
        head: the classes and the kind of task that it was trained for, if stored.
    """

    folder: Path
    mask: Mask
    values: dict[str, Tensor]
    dense: dict[str, Tensor]
    base_hash: str
    base_model: str
    head: HeadClasses | None = None


def _contents_hash(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        hash_tensor(sha, name, tensors[name])
    return sha.hexdigest()


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a sparse model's trained parameters to `folder` atomically: adapter.safetensors, adapter.json, README.md.

    The tensors are `index.NAME` (int32; int64 for parameters of more than 2^31 entries) and `values.NAME` (deltas) of
    each masked parameter, and `dense.NAME` of each densely trained one: 8 bytes per entry with float32 deltas, 6 with
    bfloat16. README.md is the model card for the Hugging Face hub. Collective where torch.distributed is initialised:
    rank 0 writes.

    Args:
        model: from `sparsify` or `load_adapter`.
        config: settings of the training that made the adapter, stored in adapter.json.
        dtype: data type of the stored deltas, float32 or bfloat16 (rounded to nearest); by default the type in which
            they were trained: float32, or float64 for a float64 base.

    Raises:
        InputError: the model is not sparse, or `dtype` is not one of these.
        RunError: the folder cannot be written.
    """
    if dtype is not None and dtype not in STORED:
        raise InputError(f"found {dtype}", " or ".join(map(str, STORED)), key="dtype")
    state = sparse_state(model)
    deltas, dense = trained_numbers(model)
    found_hash = known_hash(model, state.dense) if is_vouched(model) else base_hash(model)
    with failing_together():
        if rank_and_world()[0] > 0:
            return
        tensors: dict[str, Tensor] = {}
        for name, index in state.mask.indices.items():
            values = deltas.get(name, torch.zeros(0))
            tensors[f"index.{name}"] = index.to(index_dtype(torch.Size(state.mask.shapes[name]).numel()))
            tensors[f"values.{name}"] = values if dtype is None else values.to(dtype)
        tensors |= {f"dense.{name}": parameter.contiguous() for name, parameter in dense.items()}
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "base_model": getattr(getattr(model, "config", None), "_name_or_path", "") or "",
            "base_hash": found_hash,
            "mask_hash": state.mask.hash,
            "contents_hash": _contents_hash(tensors),
            "k": state.k,
            "dense_parameters": state.dense_parameters,
            "dense": list(dense),
            "shapes": {name: list(shape) for name, shape in state.mask.shapes.items()},
            "head": head_in_words(head_of(model)),
            "config": config or {},
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
        _write(Path(folder), tensors, meta, model_card(model, meta))


def _write(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], card: str) -> None:
    from safetensors.torch import save_file

    def fill(target: Path) -> None:
        save_file(tensors, target / "adapter.safetensors")
        write_json(target / "adapter.json", meta)
        write_atomic(target / "README.md", card)

    write_folder(folder, fill)


def read_adapter(folder: Path | str) -> Adapter:
    """Read what `save_adapter` wrote.

    Args:
        folder: adapter folder, or `OWNER/NAME` on the Hugging Face hub.

    Raises:
        InputError: there is no adapter, or its files are damaged.
    """
    folder = find_adapter(folder)
    meta = read_versioned(folder / "adapter.json", "adapter", FORMAT, VERSION)
    file = folder / "adapter.safetensors"
    tensors = read_tensors(file, "adapter")
    try:
        stated = {key: meta[key] for key in ("contents_hash", "mask_hash", "base_hash", "base_model", "head")}
        names = list(dict.fromkeys(meta["dense"]))
        shapes = {name: tuple(shape) for name, shape in meta["shapes"].items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"damaged adapter: no valid {error}", where=folder / "adapter.json") from error
    if _contents_hash(tensors) != stated["contents_hash"]:
        raise InputError("damaged adapter: its contents do not match the stored hash", where=file)
    parts: dict[str, dict[str, Tensor]] = {"index": {}, "values": {}, "dense": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        parts.setdefault(kind, {})[name] = tensor
    mask, values = Mask(parts["index"], shapes), parts["values"]
    if mask.hash != stated["mask_hash"]:
        raise InputError("damaged adapter: its mask does not match the stored hash", where=folder / "adapter.json")
    # The hashes detect damage, not malice: anyone may have written an adapter on a hub.
    for name, index in mask.indices.items():
        if name not in values or values[name].shape != index.shape or not values[name].is_floating_point():
            found = f"{values[name].dtype} {tuple(values[name].shape)}" if name in values else "none"
            raise InputError(f"damaged adapter: {name}: found values {found}", f"{len(index)} numbers", where=file)
    if set(names) != set(parts["dense"]):
        raise InputError("damaged adapter: its densely trained parameters are not those of adapter.json", where=file)
    dense = {name: parts["dense"][name] for name in names}
    head = read_head(stated["head"], folder)
    return Adapter(folder, mask, values, dense, str(stated["base_hash"]), str(stated["base_model"]), head)


def check_fits(adapter: Adapter, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check an adapter's parameters against a base model's.

    Args:
        shapes: name -> shape of each parameter of the base.

    Raises:
        InputError: the adapter belongs to another base, or its indices are impossible.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in adapter.dense.items()}
    expected |= {name: adapter.mask.shapes.get(name, ()) for name in adapter.mask.indices}
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found = shapes.get(name, "no such parameter")
            raise InputError(f"adapter for another base: {name}: found {found}", f"{shape}", where=adapter.folder)
    for name in adapter.dense:
        if len(adapter.mask.indices.get(name, ())):
            raise InputError(
                f"damaged adapter: {name} is trained both densely and by masked entries", where=adapter.folder
            )
    try:
        adapter.mask.check()
    except InputError as error:
        raise InputError(f"damaged adapter: {error}", where=adapter.folder) from error


def check_base(adapter: Adapter, found_hash: str) -> None:
    """Check the hash of a base model's weights.

    Raises:
        InputError: the adapter was trained on another base.
    """
    if found_hash != adapter.base_hash:
        raise InputError(
            f"adapter for another base: found weights {found_hash[:12]}",
            f"{adapter.base_hash[:12]} ({adapter.base_model or 'unnamed model'}, with model.dtype and model.quantize "
            "as in the adapter's training)",
            where=adapter.folder,
        )


def make_room(model: nn.Module, adapter: Adapter) -> None:
    """Make a base model sparse with the adapter's mask, and deltas of 0."""
    sparsify(model, adapter.mask, always_train=[f"^{re.escape(name)}$" for name in adapter.dense])


def load_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Load an adapter onto a fresh base model, in place: the model is then sparse, with the trained deltas.

    `model.config.id2label` and `label2id` become the adapter's, which name the model's outputs.

    Args:
        folder: adapter folder, or `OWNER/NAME` on the Hugging Face hub.

    Raises:
        InputError: there is no adapter in `folder`, its files are damaged, or it was trained on another base, for
            other classes, or for another kind of task.
    """
    if is_sparse(model):
        raise InputError(
            f"sparse already; unload or merge it before {folder} is loaded, or switch_adapter",
            where=type(model).__name__,
        )
    adapter = read_adapter(folder)
    check_head(model, adapter.head)
    check_fits(adapter, {name: shape_of(parameter) for name, parameter in model.named_parameters()})
    make_room(model, adapter)
    try:
        check_base(adapter, known_hash(model, adapter.dense))
    except InputError:
        unload(model)
        raise
    set_trained_numbers(model, adapter.values, adapter.dense)
    put_head(model, adapter.head)
    return model


def switch_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Replace the adapter of a sparse model, in place, bit for bit, by another one of the same base.

    The base is hashed at the first switch, and again only after its tensors were replaced or written to, by autograd's
    version counters; a write to a frozen weight through `.data` is not noticed. All checks precede the first change.
    The trained parameters are new tensors: an optimizer of the old ones does not train them.

    Args:
        model: from `load_adapter` or `sparsify`.
        folder: folder of the other adapter, or `OWNER/NAME` on the Hugging Face hub.

    Raises:
        InputError: the model is not sparse, or the adapter is missing, damaged, or trained on another base or for other
            classes; the model keeps its adapter.
    """
    state = sparse_state(model)
    adapter = read_adapter(folder)
    check_head(model, adapter.head, state.head_before)
    values = {id(entries.values) for entries in state.patched}
    shapes = {name: shape_of(p) for name, p in model.named_parameters() if id(p) not in values}
    check_fits(adapter, shapes)
    check_base(adapter, known_hash(model, adapter.dense))
    unload(model)
    make_room(model, adapter)
    set_trained_numbers(model, adapter.values, adapter.dense)
    put_head(model, adapter.head)
    sparse_state(model).known_bases = state.known_bases
    return model
