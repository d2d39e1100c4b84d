"""GGUF files as base models: a file is dequantised once per data type and cached as a plain checkpoint.

Candidates, ranks, Ray workers and later runs read the checkpoint. A plan reads only the model's configuration, which
has a folder of its own. Both folders are in the Hugging Face hub's cache for libraries (HF_ASSETS_CACHE), named by the
file's hash. One process writes a folder; the others wait. A damaged folder is written again.

transformers reads the file, so only its architectures work, and its dequantised weights are used. A folder is complete
if each file has its recorded size and time.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from irdscale.errors import InputError, RunError
from irdscale.models.gguf_header import GgufHeader, read_header
from irdscale.models.places import find_gguf
from irdscale.utils.files import digest, remove_temporaries, write_folder, write_json, writing
from irdscale.utils.hub import hub_access, one_line, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)
RECORD = "irdscale.json"
VERSION = 1
# Hexadecimal digits of the file's SHA-256 in a folder's name.
NAMED_BY = 32
# The tensor by which llama.cpp scales rotary positions, for example in Llama 3.1.
ROPE = "rope_freqs.weight"
Fill = Callable[[Path], None]


def cache_folder() -> Path:
    """The folder of the cached checkpoints; it may not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "irdscale" / "gguf"


def settings_folder(path: str) -> Path:
    """Return a folder with the configuration and tokenizer of a GGUF file, without weights; write it if needed.

    Args:
        path: GGUF file, as in `model.path`.

    Raises:
        InputError: the file is missing or damaged, transformers cannot read it, or gguf is not installed.
        RunError: the folder cannot be written.
    """
    file = _gguf_file(path)
    made_of = {"sha256": file_hash(file)}
    return _cached_folder(f"{made_of['sha256'][:NAMED_BY]}-settings", made_of, lambda: _settings(path, file))


def checkpoint_folder(path: str, dtype: str) -> Path:
    """Return a folder with a GGUF file's model and tokenizer as a plain checkpoint; write it if needed.

    Args:
        path: GGUF file, as in `model.path`.
        dtype: data type of the weights, to which the dequantised float32 values are rounded.

    Raises:
        InputError: as `settings_folder`.
        RunError: the folder cannot be written.
    """
    file = _gguf_file(path)
    made_of = {"sha256": file_hash(file), "dtype": dtype}
    return _cached_folder(f"{made_of['sha256'][:NAMED_BY]}-{dtype}", made_of, lambda: _checkpoint(path, file, dtype))


def file_hash(file: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits; cached until the file's size, times or inode change."""
    file = file.resolve()
    while True:
        stamp = _stamp(file)
        found = _hash_of(file, stamp)
        if _stamp(file) == stamp:
            return found


def _stamp(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@functools.lru_cache(maxsize=64)
def _hash_of(file: Path, stamp: tuple[int, ...]) -> str:
    record = cache_folder() / "hashes" / f"{digest(str(file))}.json"
    with suppress(OSError, ValueError, TypeError):
        known = json.loads(record.read_bytes())
        if known["file"] == str(file) and known["stamp"] == list(stamp):
            return str(known["sha256"])
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    # If the cache cannot be written, the next call hashes the file again.
    with suppress(RunError):
        write_json(record, {"file": str(file), "stamp": stamp, "sha256": found})
    return found


def _gguf_file(path: str) -> Path:
    file = find_gguf(path)
    assert file is not None
    return file


def _cached_folder(name: str, made_of: dict[str, str], make: Callable[[], Fill]) -> Path:
    """Return a complete cache folder; write it first if it is missing or incomplete.

    Args:
        made_of: fields of the folder's record.
        make: reads the GGUF file, and returns a function that writes the folder.
    """
    folder = cache_folder() / name
    if _is_complete(folder, made_of):
        return folder
    with _locked(folder.with_name(f"{name}.lock")):
        if _is_complete(folder, made_of):
            return folder
        fill = make()
        remove_temporaries(folder.parent, name)

        def fill_and_record(temporary: Path) -> None:
            fill(temporary)
            files = {file.name: _size_and_time(file) for file in sorted(temporary.iterdir())}
            write_json(temporary / RECORD, {"version": VERSION, **made_of, "files": files})

        try:
            write_folder(folder, fill_and_record)
        except RunError as error:
            raise RunError(f"{error} (HF_ASSETS_CACHE names another place)") from error
    return folder


def _is_complete(folder: Path, made_of: dict[str, str]) -> bool:
    try:
        record = json.loads((folder / RECORD).read_bytes())
        if {key: record.get(key) for key in ("version", *made_of)} != {"version": VERSION, **made_of}:
            return False
        return all(_size_and_time(folder / name) == stamp for name, stamp in record["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _size_and_time(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock against other processes, on this host and on hosts that share the folder."""
    from huggingface_hub.utils import WeakFileLock

    with ExitStack() as held:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(WeakFileLock(file))
        yield


@contextmanager
def _gguf_arguments(file: Path) -> Iterator[dict[str, Any]]:
    """Arguments of `from_pretrained` to read a GGUF file, from a folder without other models' files."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(file.resolve())
        with hub_access(needed=False), quiet():
            yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}


def _settings(path: str, file: Path) -> Fill:
    from transformers import AutoConfig, AutoTokenizer

    header = _checked_header(path, file)
    try:
        with _gguf_arguments(file) as read:
            config, tokenizer = AutoConfig.from_pretrained(**read), AutoTokenizer.from_pretrained(**read)
    except Exception as error:  # an architecture, key or tokenizer that transformers does not know
        raise _unreadable(path, header, error) from error

    def fill(folder: Path) -> None:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _drop_tokens(folder, header.shapes.get("token_embd.weight", (config.vocab_size,))[0])

    return fill


def _drop_tokens(folder: Path, rows: int) -> None:
    """Remove the tokens of a saved tokenizer that have no row in the embedding.

    transformers adds `<|endoftext|>` to every byte-pair vocabulary that lacks it, for example Llama 3's.
    """
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    saved = json.loads(file.read_bytes())
    added = saved.get("added_tokens", [])
    dropped = {token["content"] for token in added if token["id"] >= rows}
    if not dropped:
        return
    write_json(file, saved | {"added_tokens": [token for token in added if token["id"] < rows]})
    kept = json.loads(settings.read_bytes())
    for key, value in kept.items():
        if isinstance(value, list):
            kept[key] = [each for each in value if not isinstance(each, str) or each not in dropped]
    write_json(settings, {k: v for k, v in kept.items() if not isinstance(v, str) or v not in dropped})


def _checked_header(path: str, file: Path) -> GgufHeader:
    """Read the header of a GGUF file, and check that the file is complete."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path}: found a GGUF file, but gguf is not installed", "pip install gguf", key="model.path")
    return read_header(file, path)


def _unreadable(path: str, header: GgufHeader, error: Exception) -> InputError:
    import transformers

    found = f"{path}: found architecture {header.architecture!r}, which transformers {transformers.__version__} cannot"
    return InputError(f"{found} read from a GGUF file ({one_line(error)})", "one that it can read", key="model.path")


def _checkpoint(path: str, file: Path, dtype: str) -> Fill:
    from transformers import AutoConfig

    header, settings = _checked_header(path, file), settings_folder(path)
    log.info("%s: dequantising %s weights into %s, once", path, f"{header.parameters:,}", dtype)
    if ROPE in header.shapes:
        log.warning(
            "%s: transformers leaves out %s, which scales rotary positions: long texts give other results", path, ROPE
        )
    with hub_access(needed=False), quiet():
        config = AutoConfig.from_pretrained(settings)
    model = _saveable_model(config, _dequantised(path, file, config, dtype, header))

    def fill(folder: Path) -> None:
        shutil.copytree(settings, folder, ignore=shutil.ignore_patterns(RECORD), dirs_exist_ok=True)
        with quiet():
            model.save_pretrained(folder)

    return fill


def _dequantised(
    path: str, file: Path, config: PretrainedConfig, dtype: str, header: GgufHeader
) -> dict[str, torch.Tensor]:
    """Name of a parameter -> its weights."""
    import transformers

    loader: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "config": config, "output_loading_info": True}
    # Later versions keep weights quantised by default.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # `quiet` turns off the progress bars of transformers, but not gguf's.
        with torch.random.fork_rng(devices=[]), redirect_stderr(StringIO()), _gguf_arguments(file) as read:
            model, info = loader.from_pretrained(**read, **options)
    except Exception as error:  # transformers and gguf raise any type of error
        raise _unreadable(path, header, error) from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise InputError(f"{path}: the file lacks {len(absent)} weights, such as {absent[0]}", key="model.path")
    return model.state_dict()


def _saveable_model(config: PretrainedConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model with these weights; transformers refuses to save the model that it read from a GGUF file."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model
