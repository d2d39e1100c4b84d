"""Where the masks of a comparison lie: how much of each method's is in one parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irdscale.report.mask_overlap import most_held
from irdscale.report.verdict import percent
from irdscale.search.mask_store import load_mask, mask_folder

COLUMNS = ["method", "most entries are in", "of the masks", "of the scored parameters"]


def where_masks_lie(output: Path, study: dict[str, Any]) -> list[list[str]]:
    """A row of the `COLUMNS` for each method whose masks the folder holds, of all its seeds together.

    Raises:
        InputError: a mask is damaged.
    """
    rows = []
    for method in study["methods"]:
        hashes = [one["mask"] for one in method["seeds"] if one["mask"] is not None]
        if hashes and all(mask_folder(output, mask).exists() for mask in hashes):
            held = most_held([load_mask(output, mask) for mask in hashes])
            if held is not None:
                name, share, size = held
                rows.append([method["label"], name, percent(share), percent(size)])
    return rows
