"""The parameter that holds most of each method's mask entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irdscale.report.mask_overlap import most_held
from irdscale.search.mask_store import load_mask, mask_folder
from irdscale.utils.formats import percent

COLUMNS = ["method", "most entries are in", "of the masks", "of the scored parameters"]


def where_masks_lie(output: Path, study: dict[str, Any]) -> list[list[str]]:
    """A row of `COLUMNS` for each method whose masks are in the folder, over all its seeds.

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
