"""Write files and folders atomically: to a temporary name, then fsync, then rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irdscale.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import Tensor


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` in the body into `RunError`, with one line."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        # safetensors has its own error for a full disk. Comparing its name avoids the import.
        if type(error).__name__ != "SafetensorError":
            raise
        raise RunError(f"cannot write {path}: {error}") from error


def check_writable(folder: str | Path, key: str) -> None:
    """Check that `folder`, or its nearest existing parent, can be written. No file stays there.

    Args:
        key: setting that names the folder, for errors.

    Raises:
        InputError: it is a file or read-only, or its disk is full.
    """
    folder = Path(folder).absolute()
    existing = folder
    try:
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise InputError(f"found {folder}, but {existing} is a file", "a folder that can be written", key)
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(65536))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        fault = f"cannot write to {existing}: {error.strerror or error}"
        raise InputError(fault, "a folder that can be written", key) from error


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write `data` to `path` atomically: after a crash, the file is the old one or the new one."""
    encoded = data.encode() if isinstance(data, str) else data
    write_by(path, lambda temporary: temporary.write_bytes(encoded))


def write_by(path: Path | str, fill: Callable[[Path], object]) -> None:
    """Write a file atomically; `fill` writes it to a temporary path."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fill(temporary)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and Inf raise ValueError."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str, what: str) -> Any:
    """Read JSON from `path`.

    Raises:
        InputError: the file is missing or not JSON; the error calls it `what`.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the {what}: {error.strerror}", where=path) from error
    except ValueError as error:
        raise InputError(f"not a {what}: {error}", where=path) from error


def read_versioned(path: Path | str, what: str, format: str, version: int) -> dict[str, Any]:
    """Read a JSON object that states this `format` and `version`.

    Raises:
        InputError: as `read_json`, or the file states another format or version.
    """
    meta = read_json(path, what)
    if not isinstance(meta, dict) or meta.get("format") != format:
        raise InputError(f"found no {what}", f"format {format!r}", where=path)
    if meta.get("version") != version:
        raise InputError(f"found version {meta.get('version')}", str(version), where=path)
    return meta


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        InputError: it is missing, truncated or not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise InputError(f"cannot read the {what}: {error.strerror or 'no such file'}", where=path) from error
    except SafetensorError as error:
        raise InputError(f"damaged {what}: {error}", where=path) from error


def write_folder(folder: Path | str, fill: Callable[[Path], None]) -> None:
    """Write a folder atomically: `fill` writes into a temporary sibling, which then replaces `folder`."""
    folder = Path(folder)
    temporary: Path | None = None
    try:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            os.chmod(temporary, 0o777 & ~_umask())
            fill(temporary)
            for path in temporary.rglob("*"):
                if path.is_file():
                    # safetensors writes files that other users cannot read.
                    os.chmod(path, 0o666 & ~_umask())
                    with path.open("rb") as stream:
                        os.fsync(stream.fileno())
            fsync_folder(temporary)
            if folder.exists():
                old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
                os.replace(folder, old / "old")
                os.replace(temporary, folder)
                shutil.rmtree(old)
            else:
                os.replace(temporary, folder)
            fsync_folder(folder.parent)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def digest(value: Any) -> str:
    """16 hexadecimal digits of SHA-256 over `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Delete temporary files and folders of `name` (default: all names) that killed runs left in `folder`."""
    for path in folder.glob(f".{name}.*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
