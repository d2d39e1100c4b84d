"""Heartbeats of ranks: a rank that died or hangs ends the others, with an error that names it.

A thread on every rank sends a heartbeat once a second to a key-value store on rank 0. A rank without heartbeats is
lost: after `LOST_S` if connections to it broke, which its neighbours notice at once, else after `SILENT_S`. The others
then end themselves, because a process that waits in a collective cannot be interrupted.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from irdscale.distributed.ranks import gather_texts, rank_and_world
from irdscale.errors import InputError, RunError

BEAT_S = 1.0
# After a broken connection, a rank without heartbeats for so many seconds is the lost one.
LOST_S = 4.0
SILENT_S = 60.0


def expect_beats_within(seconds: float) -> None:
    """Set `SILENT_S`, the seconds without a heartbeat after which a rank is lost."""
    global SILENT_S
    SILENT_S = seconds


class _Watch:
    """This rank's heartbeat, and its knowledge of the other ranks'."""

    def __init__(self) -> None:
        self.group = dist.group.WORLD
        self.rank, self.world = rank_and_world()
        self.enforcing = 0
        now = time.monotonic()
        # Rank 0 observes all ranks and publishes the silent ones; the others observe rank 0 only.
        self._heard = dict.fromkeys(range(self.world) if self.rank == 0 else [0], now)
        self._last_beat = dict.fromkeys(self._heard, "")
        self._published: dict[int, float] = {}
        # Whether a connection of this rank broke, so that its main thread ends it; and of any rank.
        self.broken_here = self._broken = False
        self._store = _store(self.rank, self.world)
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._enforce)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.end)

    def end(self) -> None:
        """Stop the threads; one that uses the store while the interpreter ends would crash it."""
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * BEAT_S)
        atexit.unregister(self.end)

    def _beat(self) -> None:
        beats = 0
        while not self._ended.is_set():
            beats += 1
            try:
                if self.broken_here and not self._broken:
                    self._store.add("broken", 1)
                if self.rank == 0:
                    self._broken = self._store.add("broken", 0) > 0
                    for rank in range(1, self.world):
                        self._hear(rank, str(self._store.add(f"beat/{rank}", 0)))
                    self._store.set(
                        "status", json.dumps({"beats": beats, "broken": self._broken, "silent": self.silent(LOST_S)})
                    )
                else:
                    self._store.add(f"beat/{self.rank}", 1)
                    status = self._store.get("status").decode()
                    self._hear(0, status)
                    heard = json.loads(status)
                    self._broken = heard["broken"]
                    self._published = {int(rank): age for rank, age in heard["silent"].items()}
            except RuntimeError:
                # The store ended with rank 0, whose heartbeats stop with it.
                self._broken = True
                return
            self._ended.wait(BEAT_S)

    def _hear(self, rank: int, beat: str) -> None:
        if beat != self._last_beat[rank]:
            self._last_beat[rank], self._heard[rank] = beat, time.monotonic()

    def silent(self, seconds: float) -> dict[int, float]:
        """Other ranks without a heartbeat for so many seconds -> seconds since their last one."""
        now = time.monotonic()
        # The ranks that rank 0 published go before its own silence: it may have ended because of them.
        ages = dict(self._published) or {rank: now - heard for rank, heard in self._heard.items()}
        ages.pop(self.rank, None)
        return {rank: age for rank, age in ages.items() if age > seconds}

    def _enforce(self) -> None:
        while not self._ended.wait(BEAT_S):
            lost = self.silent(LOST_S if self._broken else SILENT_S)
            if lost and self.enforcing and not self.broken_here:
                print(f"irdscale: rank {self.rank}: {_lost(lost)}", file=sys.stderr, flush=True)
                os._exit(1)


def _store(rank: int, world: int) -> dist.TCPStore:
    """A store on a free port of rank 0's host, separate from the process group's."""
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False) if rank == 0 else None
    name, here = socket.gethostname(), _network()
    first = gather_texts(json.dumps([name, here, store.port if store is not None else 0]))[0]
    if store is not None:
        return store
    there, network, port = json.loads(first)
    host = "127.0.0.1" if (there, network) == (name, here) else os.environ.get("MASTER_ADDR", there)
    return dist.TCPStore(host, port, world, is_master=False, wait_for_workers=False)


def _network() -> str:
    """Identifier of this process's network namespace on Linux: equal identifiers share 127.0.0.1, unlike host names."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return ""


_current: _Watch | None = None


@contextmanager
def watched() -> Iterator[None]:
    """Run collective work in the body: a rank that dies or hangs ends the others, which name it.

    A killed rank ends them within about 15 seconds, a silent one 5 seconds after `SILENT_S`.

    Raises:
        RunError: a rank died; names it.
    """
    global _current
    if rank_and_world()[1] == 1:
        yield
        return
    if _current is None or _current.group is not dist.group.WORLD:
        if _current is not None:
            _current.end()
        _current = _Watch()
    watch = _current
    watch.enforcing += 1
    try:
        yield
    except (InputError, RunError):
        raise
    except RuntimeError as error:
        if not _is_broken_connection(error):
            raise
        watch.broken_here = True
        time.sleep(LOST_S + 3 * BEAT_S)
        lost = watch.silent(LOST_S)
        if lost:
            raise RunError(_lost(lost)) from error
        raise
    finally:
        watch.enforcing -= 1


def _is_broken_connection(error: RuntimeError) -> bool:
    # gloo raises a plain RuntimeError.
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def _lost(ranks: Collection[int]) -> str:
    names = ", ".join(map(str, sorted(ranks)))
    which = f"rank {names} does" if len(ranks) == 1 else f"ranks {names} do"
    return f"{which} not answer: killed, out of memory, or its machine is gone"
