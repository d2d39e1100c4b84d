"""The ledger as all ranks see it: rank 0 writes, every rank holds the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from irdscale.distributed.ranks import failing_together, gather_texts, rank_and_world
from irdscale.search.ledger import Ledger


class SharedLedger:
    """A ledger with the same records on every rank; collective.

    Attributes:
        records: all records in order.
        finished: key -> record with status ok.

    Raises:
        InputError: another process has the file open, or a record is damaged.
    """

    def __init__(self, path: Path) -> None:
        with failing_together():
            self._ledger = Ledger(path) if rank_and_world()[0] == 0 else None
        own = [] if self._ledger is None else self._ledger.records
        self.records: list[dict[str, Any]] = json.loads(gather_texts(json.dumps(own))[0])
        self.finished = {record["key"]: record for record in self.records if record["status"] == "ok"}

    def __enter__(self) -> SharedLedger:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ledger is not None:
            self._ledger.__exit__()

    def append(self, record: dict[str, Any]) -> None:
        """Write rank 0's record to disk and hold it on every rank.

        Raises:
            RunError: the file cannot be written.
        """
        record = json.loads(gather_texts(json.dumps(record))[0])
        with failing_together():
            if self._ledger is not None:
                self._ledger.append(record)
        self.records.append(record)
        if record["status"] == "ok":
            self.finished[record["key"]] = record
