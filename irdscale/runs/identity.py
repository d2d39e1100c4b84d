"""What a run read, as digests: the samples of each split, and the base model's files.

Samples count as they are loaded, limited and tokenised, so that neither a file's type nor its place or time tells.
Weights count by their tensors, so that neither shards nor file times tell. Their files are read, by as many threads as
there are processors, only where sizes or times are not those of a record: about 0.7 GB/s a core. Hashing samples takes
about 1 % of what tokenising them takes.
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
from irdscale.models.places import find_gguf, is_gguf, resolve_model_path
from irdscale.utils.files import digest

if TYPE_CHECKING:
    import pyarrow as pa

    from irdscale.tasks import Task

SPLITS = ("train", "selection", "test", "pool")
PIECE = 2**23
# What transformers loads, the first that is there.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SETTINGS = ("config.json", "generation_config.json", "adapter_config.json")
# What tells by whom and where a file was written, not what is in it.
WRITTEN_BY = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")


def data_digests(task: Task) -> dict[str, str]:
    """A digest of the samples of each split of a task (and of the pool, if shaped), and of its classes' names."""
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
    """Hash an array by its values, whatever widths and offsets it is stored with."""
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
    """What tells a model's files from others.

    Args:
        known: result of an earlier call; files whose sizes and times are the same are not read again.

    Returns:
        {"weights": digest of all tensors, None where they are yet to be downloaded; "revision": of a hub model;
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
    """Names of the files in which two results of `model_digests` differ; none where they are one model."""
    changed = [
        name
        for name in sorted({*before["settings"], *now["settings"]})
        if before["settings"].get(name) != now["settings"].get(name)
    ]
    if before["weights"] is None or now["weights"] is None:
        # Of a hub model that was not downloaded yet.
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
    """Where a model's folder, or its GGUF file, is here; None where it is yet to be downloaded."""
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
    """The files that hold a model's weights."""
    adapter = [folder / "adapter_model.safetensors", folder / "adapter_model.bin"]
    for name in WEIGHTS:
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
    """A JSON file without what its writer left of itself; its text where it is no JSON."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        return file.read_bytes().decode(errors="replace")
    return {key: value for key, value in found.items() if key not in WRITTEN_BY} if isinstance(found, dict) else found


def _contents(file: Path) -> str:
    """A digest of a file: of safetensors the sum of its tensors' digests, so that shards tell nothing."""
    if is_gguf(file.name):
        return file_hash(file)
    pieces = list(_pieces(file))
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        found = pool.map(lambda piece: _piece(file, *piece), pieces)
        return f"{sum(found) % 2**256:064x}"


def _pieces(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of what is hashed for itself."""
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
            # Damaged; the load says so.
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
