"""The journal of a search: one JSON line for each evaluation that ended, on disk before anything else happens.

Each record begins with a newline, so that a line torn by a crash eats nothing of the next one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

from irdscale.errors import InputError
from irdscale.utils.files import digest, fsync_folder, writing

FIELDS = ("round", "samples", "params", "seed", "direction", "mask", "metric", "status", "error", "seconds", "key")
# Where the training's loss began and ended; see `irdscale.training.loss_trend.loss_trend`.
MORE_FIELDS = ("loss",)

_STOPPED = re.compile(r"stopped early at step (\d+),")
_BEGINNING = b'{"round": '
log = logging.getLogger(__name__)


def evaluation_key(mask_hash: str, train_config: dict[str, Any], seed: int) -> str:
    """What makes two evaluations the same: their mask, training configuration and seed."""
    return digest({"mask": mask_hash, "train": train_config, "seed": seed})


def stopped_early(step: int, metric: float) -> str:
    """The error of an evaluation that was ended because others of its round were better."""
    return f"stopped early at step {step}, with {metric:.4f}"


def stopped_at(record: dict[str, Any]) -> int | None:
    """The step at which an evaluation was stopped early; None if it was not."""
    found = _STOPPED.match(record["error"] or "")
    return int(found[1]) if found else None


def read_ledger(path: Path | str) -> list[dict[str, Any]]:
    """Every whole record, in order; a line that a crash tore is skipped.

    Raises:
        InputError: the file cannot be read, or a whole line is no record (file and row named), or two records with
            status ok have one key.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot read the ledger: {error.strerror}") from error
    records: list[dict[str, Any]] = []
    finished: set[str] = set()
    for row, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if line.startswith(_BEGINNING[: len(line)]):
                log.warning("%s:%d: skipped half a record, left by a crash", path, row)
                continue
            raise InputError(f"{path}:{row}: found no JSON; expected a ledger record") from None
        if not isinstance(record, dict) or not set(FIELDS) <= set(record):
            raise InputError(f"{path}:{row}: expected a ledger record with {', '.join(FIELDS)}")
        if record["status"] == "ok":
            if record["key"] in finished:
                raise InputError(f"{path}:{row}: found key {record['key']} twice; expected one finished evaluation")
            finished.add(record["key"])
        records.append(record)
    return records


class Ledger:
    """The open journal of one output folder; the only writer, while it is open.

    Raises:
        InputError: another process has it open, or its contents are damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            fsync_folder(self.path.parent)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.records = read_ledger(self.path)
        except BlockingIOError:
            os.close(self._descriptor)
            raise InputError(f"{self.path}: another irdscale is writing it; expected one at a time") from None
        except InputError:
            os.close(self._descriptor)
            raise
        self.finished = {record["key"]: record for record in self.records if record["status"] == "ok"}

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def append(self, record: dict[str, Any]) -> None:
        """Write a record and wait until it is on disk.

        Raises:
            ValueError: a field is missing, the metric of an ok record is no finite number, or its key is finished.
            RunError: the disk refuses it.
        """
        if set(FIELDS) - set(record):
            raise ValueError(f"ledger record lacks {', '.join(sorted(set(FIELDS) - set(record)))}")
        finished = record["status"] == "ok"
        if finished and not (isinstance(record["metric"], int | float) and math.isfinite(record["metric"])):
            raise ValueError(f"ledger record has metric {record['metric']}; expected a finite number")
        if finished and record["key"] in self.finished:
            raise ValueError(f"ledger has key {record['key']} already")
        written = {name: record[name] for name in (*FIELDS, *MORE_FIELDS) if name in record}
        line = f"\n{json.dumps(written, allow_nan=False)}\n".encode()
        with writing(self.path):
            if os.write(self._descriptor, line) != len(line):
                raise OSError("the disk took a part of a record")
            os.fsync(self._descriptor)
        self.records.append(record)
        if finished:
            self.finished[record["key"]] = record
