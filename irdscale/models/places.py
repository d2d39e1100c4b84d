"""Find the model of `model.path`: a folder, a GGUF file, a part of an installed package, or a model on the hub."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from irdscale.errors import InputError
from irdscale.utils.hub import hub_access, is_hub_id, one_line
from irdscale.utils.suggestions import nearest

# Names of the files that hold a checkpoint's weights, in the order of transformers, which loads the first that exists.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PACKAGE = "package:"
GGUF = ".gguf"


def is_gguf(path: str) -> bool:
    """Whether a path ends in `.gguf` and is not a folder."""
    return path.lower().endswith(GGUF) and not Path(path).expanduser().is_dir()


def resolve_model_path(path: str) -> str:
    """The folder or GGUF file of `model.path`; a path on the hub is returned as it is.

    `package:NAME/FOLDER` and `package:NAME/FILE.gguf` are inside an installed Python package, which is not imported.
    `OWNER/NAME/FILE.gguf` is a file of the hub id `OWNER/NAME`.

    Raises:
        InputError: there is no such package, folder or file, or the folder holds no model.
    """
    if path.startswith(PACKAGE):
        return str(_in_package(path))
    place = Path(path).expanduser()
    if place.is_dir():
        if not (place / "config.json").is_file():
            files = sorted(file.name for file in place.iterdir() if is_gguf(file.name))
            hint = f"; expected one, or a GGUF file by its name: {', '.join(files)}" if files else ""
            raise InputError(f"{path}: not a model folder: found no config.json{hint}", key="model.path")
        return str(place)
    if place.exists():
        if not is_gguf(path):
            raise InputError(
                f"{path}: found a file", f"a model folder, a GGUF file ({GGUF}) or a hub id", key="model.path"
            )
        return str(place)
    if is_gguf(path):
        if _hub_file(path) is None:
            raise InputError(f"{path}: no such file", key="model.path")
        return path
    if not is_hub_id(path):
        raise InputError(f"{path}: no such folder", key="model.path")
    return path


def find_gguf(path: str, download: bool = True) -> Path | None:
    """The GGUF file of `model.path`; a file on the hub is downloaded into the hub's cache.

    Args:
        download: False to return None for a hub file that is not in the cache.

    Raises:
        InputError: as `resolve_model_path`; or the hub has no such file, or cannot be reached.
    """
    resolved = resolve_model_path(path)
    if Path(resolved).is_file():
        return Path(resolved)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repository, file = _hub_file(resolved) or ("", "")
    if not download:
        found = try_to_load_from_cache(repository, file)
        return Path(found) if isinstance(found, str) else None
    try:
        with hub_access():
            return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub's errors and its HTTP client's have no common class
        raise InputError(
            f"{path}: no such file here, and none loaded from the hub: {one_line(error)}", key="model.path"
        ) from error


def _hub_file(path: str) -> tuple[str, str] | None:
    """Hub id and file of `OWNER/NAME/FILE.gguf`; None for other paths."""
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    return (f"{owner}/{name}", file) if file and is_hub_id(f"{owner}/{name}") else None


def _in_package(path: str) -> Path:
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    # A dotted name would import its parents.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        underscored = name.replace("-", "_")
        hint = f' (did you mean "{underscored}"?)' if underscored != name else "; expected an installed one"
        raise InputError(f"{path}: found no Python package {name!r}{hint}", key="model.path")
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    for root in roots:
        place = root / inside
        if place.is_file() if is_gguf(inside) else (place / "config.json").is_file():
            return place
    models = sorted(
        str((file if is_gguf(file.name) else file.parent).relative_to(root))
        for root in roots
        for pattern in ("config.json", f"*{GGUF}")
        for file in root.rglob(pattern)
        if is_gguf(file.name) or _is_model(file)
    )
    there = ", ".join(f"{PACKAGE}{name}/{model}" for model in models) or "there is none in the package"
    missing = "no such file" if is_gguf(inside) else "found no config.json"
    raise InputError(f"{path}: {missing}{nearest(inside, models)}; models: {there}", key="model.path")


def _is_model(file: Path) -> bool:
    try:
        return "model_type" in json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
