"""One writer at a time: a lock file with its holder's host and process, which the kernel releases when that ends."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from irdscale.errors import InputError
from irdscale.utils.files import writing

NAME = ".irdscale.runs.lock"
log = logging.getLogger(__name__)
# Errors of file systems without locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Hold a folder's lock; creates the folder, and removes it at the end if it is empty.

    Args:
        key: setting that names the folder, for messages.

    Raises:
        InputError: another process holds the lock (names its host and process).
        RunError: the folder cannot be written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    file = folder / NAME
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _taken(file, folder, key)
    try:
        yield
    finally:
        # Remove it while locked: a process that opened it notices that the folder's file is another one.
        file.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):
            for each in made:
                each.rmdir()


def _taken(file: Path, folder: Path, key: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            expected = f"one at a time: wait for it, or another {key}=..."
            raise InputError(f"{folder}: {holder} is writing it", expected, key=key) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            log.warning("%s: cannot be locked (%s): two runs may write it at once", folder, error.strerror)
        with suppress(OSError):
            if os.stat(file).st_ino == os.fstat(descriptor).st_ino:
                break
        # The holder removed the file between the two calls.
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode(), 0)
    return descriptor


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"another irdscale, process {holder['process']} on host {holder['host']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another irdscale"
