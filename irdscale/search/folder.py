"""Checks of the output folder of a search or a comparison, and removal of half-written files."""

from __future__ import annotations

from pathlib import Path

from irdscale.config.loader import config_changes, load_config, same_search
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.search.ledger import read_ledger
from irdscale.utils.files import remove_temporaries


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


def clean(output: Path) -> None:
    """Remove files that a killed run left half-written; only names that a search writes."""
    for folder in ("masks", "candidates", "fisher"):
        remove_temporaries(output / folder)
    for name in ("config.yaml", "adapter", "result.json"):
        remove_temporaries(output, name)
