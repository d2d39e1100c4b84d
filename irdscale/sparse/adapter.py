"""Adapter folders: the k deltas and their places, and what they belong to."""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from irdscale.errors import InputError
from irdscale.files import read_json, read_tensors, write_folder, write_json
from irdscale.mask import Mask
from irdscale.partitioned import shape_of
from irdscale.ranks import failing_together, rank_and_world
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

FORMAT = "irdscale-adapter"
VERSION = 1


def _contents_hash(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        hash_tensor(sha, name, tensors[name])
    return sha.hexdigest()


def save_adapter(model: nn.Module, folder: Path | str, config: dict[str, Any] | None = None) -> None:
    """Write a sparse model's trained numbers to `folder`: adapter.safetensors and adapter.json, atomically.

    Holds for each masked parameter `index.NAME` (int32, or int64 for parameters beyond 2^31 entries) and
    `values.NAME` (float32 deltas), and `dense.NAME` for each parameter that is trained whole.

    Args:
        model: from `sparsify` or `load_adapter`.
        config: what made the adapter, kept in adapter.json for the reader.

    Raises:
        InputError: the model is not sparse.
        RunError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    state = sparse_state(model)
    deltas, dense = trained_numbers(model)
    tensors = {f"index.{name}": state.mask.indices[name].cpu() for name in deltas}
    tensors |= {f"values.{name}": values for name, values in deltas.items()}
    tensors |= {f"dense.{name}": values for name, values in dense.items()}
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "base_model": getattr(getattr(model, "config", None), "_name_or_path", "") or "",
        "base_hash": base_hash(model),
        "mask_hash": state.mask.hash,
        "contents_hash": _contents_hash(tensors),
        "k": state.k,
        "dense_parameters": state.dense_parameters,
        "dense": list(state.dense),
        "shapes": {name: list(shape) for name, shape in state.mask.shapes.items()},
        "config": config or {},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }

    def fill(target: Path) -> None:
        save_file(tensors, target / "adapter.safetensors")
        write_json(target / "adapter.json", meta)

    with failing_together():
        if rank_and_world()[0] == 0:
            write_folder(folder, fill)


def load_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Put an adapter on a fresh base model, in place: the model is then sparse, with the trained deltas.

    Raises:
        InputError: there is no adapter in `folder`, its files are damaged, or it was trained on another base.
    """
    folder = Path(folder)
    if is_sparse(model):
        raise InputError(f"{type(model).__name__}: sparse already; unload or merge it before {folder} is loaded")
    meta = read_json(folder / "adapter.json", "adapter")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"{folder / 'adapter.json'}: found no adapter; expected format {FORMAT!r}")
    if meta.get("version") != VERSION:
        raise InputError(f"{folder / 'adapter.json'}: found version {meta.get('version')}; expected {VERSION}")
    file = folder / "adapter.safetensors"
    tensors = read_tensors(file, "adapter")
    try:
        stated = {key: meta[key] for key in ("contents_hash", "mask_hash", "base_hash", "dense", "base_model")}
        shapes = {name: tuple(shape) for name, shape in meta["shapes"].items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{folder / 'adapter.json'}: damaged adapter: no valid {error}") from error
    if _contents_hash(tensors) != stated["contents_hash"]:
        raise InputError(f"{file}: damaged adapter: its contents do not match the stored hash")
    indices = {key.removeprefix("index."): t for key, t in tensors.items() if key.startswith("index.")}
    mask = Mask(indices, shapes)
    if mask.hash != stated["mask_hash"]:
        raise InputError(f"{folder / 'adapter.json'}: damaged adapter: its mask does not match the stored hash")
    parameters = dict(model.named_parameters())
    for name in stated["dense"]:
        dense = tensors.get(f"dense.{name}")
        if name not in parameters or dense is None or tuple(dense.shape) != shape_of(parameters[name]):
            found = shape_of(parameters[name]) if name in parameters else "no such parameter"
            expected = "missing" if dense is None else tuple(dense.shape)
            raise InputError(f"{folder}: adapter for another base: {name}: found {found}; expected {expected}")
    try:
        sparsify(model, mask, always_train=[f"^{re.escape(name)}$" for name in stated["dense"]])
    except InputError as error:
        raise InputError(f"{folder}: adapter for another base: {error}") from error
    found_hash = base_hash(model)
    if found_hash != stated["base_hash"]:
        unload(model)
        raise InputError(
            f"{folder}: adapter for another base: found weights {found_hash[:12]}; "
            f"expected {stated['base_hash'][:12]} ({stated['base_model'] or 'unnamed model'})"
        )
    set_trained_numbers(
        model,
        {name: tensors[f"values.{name}"] for name in mask.indices},
        {name: tensors[f"dense.{name}"] for name in stated["dense"]},
    )
    return model
