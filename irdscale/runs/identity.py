"""Digests of what a run read: the samples of each split, and the base model's files.

Samples are hashed after loading, limits and tokenisation, so that a file's format, path and time do not matter. Weights
are hashed by tensor, so that sharding and file times do not matter. Files are read, by one thread per CPU (about 0.7
GB/s per core), only if their size or time differs from the record. Hashing samples takes about 1 % of the time to
tokenise them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irdscale.config.schema import ModelConfig
from irdscale.errors import InputError
from irdscale.models.dequantised import file_hash
from irdscale.models.places import WEIGHT_FILES, find_gguf, is_gguf, resolve_model_path
from irdscale.utils.files import digest

if TYPE_CHECKING:
    import pyarrow as pa

    from irdscale.tasks import Task

SPLITS = ("train", "selection", "test", "pool")
PIECE = 2**23
SETTINGS = ("config.json", "generation_config.json", "adapter_config.json")
# Keys of a JSON file that describe its writer, not its contents.
WRITTEN_BY = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")


def data_digests(task: Task) -> dict[str, str]:
    """Digests of the samples of each split, of the pool if shaped, and of the class names."""
    splits = {name: getattr(task, name) for name in SPLITS}
    found = {name: _samples(split) for name, split in splits.items() if split is not None}
    return {**found, "classes": digest(list(getattr(task, "label_names", ())))}


def _samples(split: Any) -> str:
    sha = hashlib.sha256()
    if not hasattr(split, "with_format"):
        return digest([str(sample) for sample in split])
    table = split.with_format("arrow")[:]
    for name in sorted(table.column_names):
        sha.update(f"{name}\0{table.num_rows}\0".encode())
        _add(sha, table.column(name).combine_chunks())
    return sha.hexdigest()[:16]


def _add(sha: Any, values: pa.Array | pa.ChunkedArray) -> None:
    """Hash an array's values, independent of stored widths and offsets."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _add(sha, pc.fill_null(pc.list_value_length(values), -1))
        _add(sha, pc.list_flatten(values))
    elif (pa.types.is_integer(kind) or pa.types.is_boolean(kind)) and not values.null_count:
        sha.update(values.cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
    elif pa.types.is_floating(kind) and not values.null_count:
        sha.update(values.cast(pa.float64()).to_numpy(zero_copy_only=False).tobytes())
    else:
        sha.update(json.dumps(values.to_pylist(), default=str).encode())


def model_digests(model: ModelConfig, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Digests of a model's files.

    Args:
        known: result of an earlier call; files with the same size and times are not read again.

    Returns:
        {"weights": digest of all tensors, None before their download; "revision": revision of a hub model;
        "settings": {file: digest} of its configurations and code; "files": {file: size, times and digest}}.
    """
    place = _place(model.path)
    if place is None:
        return {"weights": None, "revision": None, "settings": {}, "files": {}}
    # A GGUF file has no settings beside it.
    folder = place.parent if place.is_file() else place
    before = dict((known or {}).get("files", {}))
    files: dict[str, Any] = {}
    for file in [place] if place.is_file() else _weights_of(place):
        stat, old = file.stat(), before.get(file.name, {})
        stamp = {"size": stat.st_size, "time": stat.st_mtime_ns, "changed": stat.st_ctime_ns}
        same = all(old.get(key) == value for key, value in stamp.items())
        files[file.name] = stamp | {"digest": old["digest"] if same else _contents(file)}
    names = () if place.is_file() else SETTINGS
    settings = {file.name: digest(_settings(file)) for name in names if (file := folder / name).is_file()}
    if model.trust_remote_code and place.is_dir():
        code = sorted(folder.glob("*.py"))
        settings |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in code}
    total = sum(int(entry["digest"], 16) for entry in files.values()) % 2**256
    return {
        "weights": f"{total:064x}" if files else None,
        "revision": folder.name if folder.parent.name == "snapshots" else None,
        "settings": settings,
        "files": files,
    }


def model_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the files in which two results of `model_digests` differ; empty for the same model."""
    changed = [
        name
        for name in sorted({*before["settings"], *now["settings"]})
        if before["settings"].get(name) != now["settings"].get(name)
    ]
    if before["weights"] is None or now["weights"] is None:
        # A hub model before its download.
        revisions = before["revision"], now["revision"]
        return changed + (
            [f"revision {revisions[0]}"] if None not in revisions and revisions[0] != revisions[1] else []
        )
    if before["weights"] == now["weights"]:
        return changed
    old = {entry["digest"] for entry in before["files"].values()}
    others = [name for name, entry in now["files"].items() if entry["digest"] not in old]
    return [*changed, *(others or now["files"])]


def _place(path: str) -> Path | None:
    """A model's local folder or GGUF file; None before its download."""
    try:
        resolved = resolve_model_path(path)
    except InputError:
        return None
    if is_gguf(resolved):
        return find_gguf(path, download=False)
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(resolved, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _weights_of(folder: Path) -> list[Path]:
    """A model's weight files."""
    adapter = [folder / "adapter_model.safetensors", folder / "adapter_model.bin"]
    for name in WEIGHT_FILES:
        file = folder / name
        if not file.is_file():
            continue
        names = [name]
        if name.endswith(".index.json"):
            index = _settings(file)
            shards = index.get("weight_map", {}) if isinstance(index, dict) else {}
            names = sorted({str(shard) for shard in shards.values()})
        return [one for one in [*(folder / each for each in names), *adapter] if one.is_file()]
    return sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf", ".pt"))


def _settings(file: Path) -> Any:
    """A JSON file without the keys of its writer; its text if it is not JSON."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        return file.read_bytes().decode(errors="replace")
    return {key: value for key, value in found.items() if key not in WRITTEN_BY} if isinstance(found, dict) else found


def _contents(file: Path) -> str:
    """Digest of a file; of safetensors the sum of its tensors' digests, so that sharding does not matter."""
    if is_gguf(file.name):
        return file_hash(file)
    pieces = list(_pieces(file))
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        found = pool.map(lambda piece: _piece(file, *piece), pieces)
        return f"{sum(found) % 2**256:064x}"


def _pieces(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of each separately hashed piece."""
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length)) if length < size else {}
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = (8 + length + place for place in entry["data_offsets"])
                    yield f"{name}\0{entry['dtype']}\0{entry['shape']}", begin, end
            return
        except (ValueError, KeyError, TypeError):
            # The file is damaged; loading it reports that.
            pass
    yield file.name, 0, size


def _piece(file: Path, name: str, begin: int, end: int) -> int:
    sha = hashlib.sha256(f"{name}\0".encode())
    with file.open("rb", buffering=0) as stream:
        stream.seek(begin)
        while begin < end:
            data = stream.read(min(PIECE, end - begin))
            if not data:
                break
            sha.update(data)
            begin += len(data)
    return int(sha.hexdigest(), 16)
