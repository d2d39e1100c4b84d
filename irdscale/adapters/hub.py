"""Adapter folders on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from irdscale.errors import InputError, RunError
from irdscale.utils.hub import hub_access, is_hub_id, one_line

FILES = ["adapter.json", "adapter.safetensors", "README.md"]


def _is_repository(name: str) -> bool:
    return "/" in name and is_hub_id(name)


def _check_id(repo_id: str) -> None:
    if not _is_repository(repo_id):
        raise InputError("found no name on the hub", "OWNER/NAME", where=repo_id)


def push_adapter(folder: Path | str, repo_id: str, private: bool = True) -> str:
    """Upload an adapter folder to the Hugging Face hub, with the token that `hf auth login` or HF_TOKEN gives.

    Args:
        folder: from `save_adapter`; checked before anything is sent.
        repo_id: OWNER/NAME of the repository, created if it does not exist.
        private: whether a created repository is private; an existing one stays as it is.

    Returns:
        The URL of the repository.

    Raises:
        InputError: there is no adapter in `folder`, it is damaged, or `repo_id` is not OWNER/NAME.
        RunError: the hub does not answer or refuses the upload.
    """
    from irdscale.adapters.format import read_adapter

    _check_id(repo_id)
    if not Path(folder).is_dir():
        raise InputError("no such folder", "an adapter", where=folder)
    read_adapter(folder)
    try:
        with hub_access():
            from huggingface_hub import HfApi

            api = HfApi()
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, allow_patterns=FILES, commit_message="Upload irdscale adapter"
            )
    except Exception as error:  # the hub's errors and its HTTP client's have no common class
        raise RunError(f"{folder}: cannot push to {repo_id} on the hub: {one_line(error)}") from error
    return str(address)


def pull_adapter(repo_id: str, folder: Path | str | None = None, revision: str | None = None) -> Path:
    """Download an adapter from the Hugging Face hub.

    Args:
        repo_id: OWNER/NAME of the repository.
        folder: target folder; by default the hub's cache, which also works offline.
        revision: branch, tag or commit.

    Returns:
        The folder, for `load_adapter`.

    Raises:
        InputError: there is no such repository, or it cannot be reached.
    """
    _check_id(repo_id)
    try:
        with hub_access():
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(repo_id, revision=revision, local_dir=folder, allow_patterns=FILES))
    except Exception as error:  # as above
        raise InputError(f"no adapter loaded from the hub: {one_line(error)}", where=repo_id) from error


def find_adapter(place: Path | str) -> Path:
    """The folder `place`, or, if there is none, the download of `OWNER/NAME` from the hub.

    Raises:
        InputError: neither exists.
    """
    folder = Path(place).expanduser()
    if folder.exists() or not _is_repository(str(place)):
        return folder
    try:
        return pull_adapter(str(place))
    except InputError as error:
        raise InputError(f"no such folder here, and {error.found}", where=place) from error
