"""The output folder of a search, or a comparison: whose it is, and what a killed run left in it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import yaml
from pydantic import ValidationError

from irdscale.config import RunConfig
from irdscale.config_file import config_changes, same_search
from irdscale.errors import InputError
from irdscale.files import remove_temporaries
from irdscale.search.ledger import read_ledger


def refuse_changes(config: RunConfig, output: Path) -> None:
    """A search goes on only with the configuration that it began with.

    Raises:
        InputError: the folder holds another search; names what changed.
    """
    stored = output / "config.yaml"
    if not stored.exists():
        if read_ledger(output / "ledger.jsonl"):
            raise InputError(f"output: {output} holds a ledger but no config.yaml; expected a new folder (output=...)")
        return
    try:
        before = yaml.safe_load(stored.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{stored}: cannot read the configuration of the earlier search: {error}") from error
    if isinstance(before, dict) and isinstance(before.get("fisher"), dict):
        # Before there was this key, masks were of the whole model.
        before["fisher"].setdefault("scope", "global")
    with suppress(ValidationError):
        # What a newer version can be told has its default in an older folder.
        before = RunConfig.model_validate(before).model_dump(mode="json")
    changes = (
        config_changes(same_search(before), same_search(config.model_dump(mode="json")))
        if isinstance(before, dict)
        else []
    )
    if not isinstance(before, dict) or changes:
        found = "; ".join(changes) or "no configuration"
        raise InputError(
            f"output: {output} holds a search with another configuration ({found}); expected the same one, another "
            f"folder (output=...), or --overwrite"
        )


def clean(output: Path) -> None:
    """Remove what a killed run left half-written; only names that a search writes."""
    for folder in ("masks", "candidates", "fisher"):
        remove_temporaries(output / folder)
    for name in ("config.yaml", "adapter", "result.json"):
        remove_temporaries(output, name)
