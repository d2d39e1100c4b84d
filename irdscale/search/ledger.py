"""The ledger of a search: one JSON line per finished evaluation, written to disk before the search goes on.

Each record begins with a newline, so a line torn by a crash does not damage the next one.
"""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from irdscale.distributed.ranks import broadcast_json, failing_together, rank_and_world
from irdscale.errors import InputError
from irdscale.utils.files import digest, fsync_folder, writing

FIELDS = ("round", "samples", "params", "seed", "direction", "mask", "metric", "status", "error", "seconds", "key")
# Optional. loss: `irdscale.training.loss_trend.loss_trend` of the training. stopped_at: step of an early stop.
# kept_step: step of the best evaluation, whose numbers were kept (`train.keep: best`).
# adapter_bytes: size of the adapter's file. peak_bytes: peak GPU memory of the training.
MORE_FIELDS = ("loss", "stopped_at", "kept_step", "adapter_bytes", "peak_bytes")

_BEGINNING = b'{"round": '
log = logging.getLogger(__name__)


def evaluation_key(mask_hash: str, train_config: dict[str, Any], seed: int) -> str:
    """Hash of mask, training configuration and seed: evaluations with equal keys are the same."""
    return digest({"mask": mask_hash, "train": train_config, "seed": seed})


def read_ledger(path: Path | str) -> list[dict[str, Any]]:
    """All records in order. A line torn by a crash is skipped; a missing file has no records.

    Raises:
        InputError: the file cannot be read, a complete line is not a record (names file and row), or two records with
            status ok have the same key.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read the ledger: {error.strerror}", where=path) from error
    records: list[dict[str, Any]] = []
    finished: set[str] = set()
    for row, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if line.startswith(_BEGINNING[: len(line)]):
                log.warning("%s:%d: skipped a record torn by a crash", path, row)
                continue
            raise InputError("found invalid JSON", "a ledger record", where=f"{path}:{row}") from None
        if not isinstance(record, dict) or not set(FIELDS) <= set(record):
            raise InputError("found other JSON", f"a ledger record with {', '.join(FIELDS)}", where=f"{path}:{row}")
        if record["status"] == "ok":
            if record["key"] in finished:
                raise InputError(f"found key {record['key']} twice", "one finished evaluation", where=f"{path}:{row}")
            finished.add(record["key"])
        records.append(record)
    return records


class Ledger:
    """The ledger of one output folder; collective. Rank 0 writes, every rank has the records.

    The folder's lock (`irdscale.runs.folder.held`) keeps other processes from writing it.

    Attributes:
        records: all records in order.
        finished: key -> record with status ok.

    Raises:
        InputError: a record is damaged.
        RunError: the file cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, self._descriptor, own = Path(path), None, list[dict[str, Any]]()
        with failing_together(), writing(self.path):
            if rank_and_world()[0] == 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                own = read_ledger(self.path)
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                fsync_folder(self.path.parent)
        self.records: list[dict[str, Any]] = broadcast_json(own)
        self.finished = {record["key"]: record for record in self.records if record["status"] == "ok"}

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def append(self, record: dict[str, Any]) -> None:
        """Write rank 0's record and wait until it is on disk.

        Raises:
            ValueError: a field is missing, the metric of an ok record is not finite, or its key is in the ledger.
            RunError: the file cannot be written.
        """
        record = broadcast_json(record)
        if set(FIELDS) - set(record):
            raise ValueError(f"ledger record lacks {', '.join(sorted(set(FIELDS) - set(record)))}")
        finished = record["status"] == "ok"
        if finished and not (isinstance(record["metric"], int | float) and math.isfinite(record["metric"])):
            raise ValueError(f"ledger record has metric {record['metric']}; expected a finite number")
        if finished and record["key"] in self.finished:
            raise ValueError(f"ledger has key {record['key']} already")
        written = {name: record[name] for name in (*FIELDS, *MORE_FIELDS) if name in record}
        line = f"\n{json.dumps(written, allow_nan=False)}\n".encode()
        with failing_together(), writing(self.path):
            if self._descriptor is not None:
                if os.write(self._descriptor, line) != len(line):
                    raise OSError("the record was written in part")
                os.fsync(self._descriptor)
        self.records.append(record)
        if finished:
            self.finished[record["key"]] = record
