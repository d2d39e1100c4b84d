"""The output folder of a search, or a comparison: whose it is, and what a killed run left in it."""

from __future__ import annotations

from pathlib import Path

from irdscale.config.loader import config_changes, load_config, same_search
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.search.ledger import read_ledger
from irdscale.utils.files import remove_temporaries


def refuse_changes(config: RunConfig, output: Path) -> None:
    """A search goes on only with the configuration that it began with.

    Raises:
        InputError: the folder holds another search (names what changed), or its configuration is damaged.
    """
    stored = output / "config.yaml"
    if not stored.exists():
        if read_ledger(output / "ledger.jsonl"):
            raise InputError(f"output: {output} holds a ledger but no config.yaml; expected a new folder (output=...)")
        return
    before, now = (same_search(one.model_dump(mode="json")) for one in (load_config(stored), config))
    changes = config_changes(before, now)
    if changes:
        raise InputError(
            f"output: {output} holds a search with another configuration ({'; '.join(changes)}); expected the same "
            f"one, another folder (output=...), or --overwrite"
        )


def clean(output: Path) -> None:
    """Remove what a killed run left half-written; only names that a search writes."""
    for folder in ("masks", "candidates", "fisher"):
        remove_temporaries(output / folder)
    for name in ("config.yaml", "adapter", "result.json"):
        remove_temporaries(output, name)
