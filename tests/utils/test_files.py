"""Files and folders are whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from irdscale.errors import InputError, RunError
from irdscale.utils.files import (
    check_writable,
    digest,
    read_json,
    remove_temporaries,
    write_atomic,
    write_folder,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a/b.txt", "first")
    write_atomic(tmp_path / "a/b.txt", b"second")
    assert (tmp_path / "a/b.txt").read_bytes() == b"second"
    assert names(tmp_path / "a") == ["b.txt"]
    assert (tmp_path / "a/b.txt").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*a: No space left on device"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", lambda f: write_json(f / "x.json", 1))

    def half(folder: Path) -> None:
        write_json(folder / "x.json", 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "f", half)
    assert read_json(tmp_path / "f/x.json", "x") == 1
    assert names(tmp_path) == ["f"]
    write_folder(tmp_path / "f", lambda f: write_json(f / "y.json", 3))
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["y.json"]


def test_files_in_a_folder_are_for_whoever_may_read_the_folder(tmp_path: Path) -> None:
    def fill(target: Path) -> None:
        (target / "inside").mkdir()
        for name in ("a", "inside/b"):
            (target / name).write_text("new")
            (target / name).chmod(0o600)

    write_folder(tmp_path / "folder", fill)
    for name in ("a", "inside/b"):
        assert (tmp_path / "folder" / name).stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_what_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a", {"x": float("nan")})
    assert names(tmp_path) == []
    with pytest.raises(InputError, match="cannot read the thing"):
        read_json(tmp_path / "a", "thing")
    (tmp_path / "a").write_text("{")
    with pytest.raises(InputError, match="not a thing"):
        read_json(tmp_path / "a", "thing")


def test_temporaries_are_removed_by_name(tmp_path: Path) -> None:
    (tmp_path / ".adapter.x1").mkdir()
    for name in (".adapter.x1/file", ".result.json.x2", ".git", ".other.x3", "kept"):
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path, "adapter")
    remove_temporaries(tmp_path, "result.json")
    assert names(tmp_path) == [".git", ".other.x3", "kept"]
    remove_temporaries(tmp_path)
    assert names(tmp_path) == [".git", "kept"]


def test_digests_ignore_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "output")
    assert list(tmp_path.iterdir()) == []


def test_check_writable_names_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match=r"^output: found .*/a/b, but .*/a is a file; expected a folder"):
        check_writable(tmp_path / "a" / "b", "output")


@pytest.mark.parametrize(("code", "reason"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")])
def test_check_writable_full_or_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        InputError, match=rf"^to: cannot write to .*: {reason}.*; expected a folder that can be written"
    ):
        check_writable(tmp_path / "x", "to")
