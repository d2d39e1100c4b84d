"""Find the adapter or the mask that `adapter=` and `mask=` name: its own folder, or the output folder of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from irdscale.errors import InputError
from irdscale.utils.files import read_json

# Most masks that an error names.
NAMED = 3


def find_made(what: Literal["adapter", "mask"], given: str) -> str:
    """The folder of the adapter or mask; an adapter on the hub stays as it is.

    Raises:
        InputError: there is none, or the run has several masks.
    """
    folder, file = Path(given).expanduser(), f"{what}.json"
    if (folder / file).is_file():
        return given if folder == Path(given) else str(folder)
    if (folder / what / file).is_file():
        return str(folder / what)
    masks = sorted(path.parent for path in folder.glob(f"masks/*/{file}")) if what == "mask" else []
    if len(masks) == 1:
        return str(masks[0])
    if masks:
        named = ", ".join(f"mask={mask}" for mask in masks[:NAMED]) + (", .." if len(masks) > NAMED else "")
        winner = _winner(folder)
        expected = f"mask={winner}, which is the winner's, or another" if winner in masks else f"one of {named}"
        raise InputError(f"found {len(masks)} masks in {folder / 'masks'}", expected, what)
    if what == "adapter" and not folder.exists() and given.count("/") == 1 and not given.startswith((".", "/", "~")):
        # OWNER/NAME on the hub.
        return given
    if what == "adapter" and (folder / "mask" / "mask.json").is_file():
        fault = f"found a mask in {folder}, but no adapter"
        raise InputError(fault, "the output folder of a search or a training", what)
    read_json(folder / file, what)
    return given


def _winner(folder: Path) -> Path | None:
    """The folder of the mask of a search's winner, if the search has ended."""
    try:
        result: Any = json.loads((folder / "result.json").read_bytes())
        return folder / str(result["best"]["mask"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
