"""The output folder of a search or a comparison: checks, half-written files, and the open ledger."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from irdscale.config.loader import config_changes, dump_config, load_config, same_search
from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import failing_together, rank_and_world
from irdscale.errors import InputError
from irdscale.search.ledger import Ledger, read_ledger
from irdscale.utils.files import remove_temporaries, write_atomic

log = logging.getLogger(__name__)


def refuse_changes(config: RunConfig, output: Path) -> None:
    """Check that the folder's search, if any, has the same configuration.

    Raises:
        InputError: the folder holds another search (names what differs), or its configuration is damaged.
    """
    stored = output / "config.yaml"
    if not stored.exists():
        if read_ledger(output / "ledger.jsonl"):
            raise InputError(f"{output} holds a ledger but no config.yaml", "a new folder (output=...)", key="output")
        return
    before, now = (same_search(one.model_dump(mode="json")) for one in (load_config(stored), config))
    changes = config_changes(before, now)
    if changes:
        fault = f"{output} holds a search with another configuration ({'; '.join(changes)})"
        raise InputError(fault, "the same one, another folder (output=...), or --overwrite", key="output")


@contextmanager
def open_ledger(config: RunConfig, output: Path) -> Iterator[Ledger]:
    """The folder's ledger; also writes config.yaml and removes what a killed run left half-written. Collective."""
    with Ledger(output / "ledger.jsonl") as ledger:
        with failing_together():
            if rank_and_world()[0] == 0:
                write_atomic(output / "config.yaml", dump_config(config))
                _clean(output)
        if ledger.finished:
            log.info("resuming: %d evaluations are finished", len(ledger.finished))
        yield ledger


def _clean(output: Path) -> None:
    for folder in ("masks", "candidates", "fisher"):
        remove_temporaries(output / folder)
    for name in ("config.yaml", "adapter", "result.json"):
        remove_temporaries(output, name)
