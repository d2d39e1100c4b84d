"""The files of a search's masks and Fisher traces in its output folder."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irdscale.errors import InputError
from irdscale.masks.mask import Mask
from irdscale.search.ird import Pair
from irdscale.utils.files import fsync_folder, read_json, writing


@dataclass(frozen=True)
class SearchMasks:
    """Start and smallest pair of a search, and the mask hash of every pair it can reach.

    Attributes:
        facts: "parameters", "scored", "head" (entries), "scored_by" (text), "sample_gradients", "seconds".
    """

    start: Pair
    minimum: Pair
    masks: dict[Pair, str]
    facts: dict[str, Any]

    @property
    def fewest(self) -> Pair:
        """The pair with the fewest samples and the most parameters."""
        return Pair(min(pair.samples for pair in self.masks), self.start.params)


def mask_folder(output: Path, mask_hash: str) -> Path:
    """Folder of the mask with this hash."""
    return output / "masks" / mask_hash


def index_file(output: Path, name: str = "") -> Path:
    """File with a search's list of masks; `name` is the search's name, if several share the folder."""
    return output / "fisher" / name / "masks.json"


def traces_file(output: Path, name: str = "") -> Path:
    """File with the Fisher traces of a search's samples."""
    return output / "fisher" / name / "traces.json"


def as_stored(masks: SearchMasks, made_by: str) -> dict[str, Any]:
    """Contents of `index_file`; `made_by` is the hash of the search's configuration."""
    return {
        "start": [masks.start.samples, masks.start.params],
        "minimum": [masks.minimum.samples, masks.minimum.params],
        "masks": [[pair.samples, pair.params, mask] for pair, mask in masks.masks.items()],
        "facts": masks.facts,
        "made_by": made_by,
    }


def read_masks(index: Path) -> tuple[SearchMasks, str]:
    """A search's masks, and the hash of the configuration that made them.

    Raises:
        InputError: the file is missing or damaged.
    """
    stored = read_json(index, "list of masks")
    try:
        masks = {Pair(s, p): str(mask) for s, p, mask in stored["masks"]}
        read = SearchMasks(Pair(*stored["start"]), Pair(*stored["minimum"]), masks, dict(stored["facts"]))
        if not {read.start, read.fewest} <= set(masks):
            raise ValueError(f"mask of {read.start}")
        return read, str(stored["made_by"])
    except (KeyError, TypeError, ValueError) as error:
        fault = f"not a list of masks: no valid {error}"
        raise InputError(fault, "a new folder, or this one deleted", where=index) from error


def load_mask(output: Path, mask_hash: str) -> Mask:
    """Load the mask with this hash.

    Raises:
        InputError: it is missing or damaged, or has another hash.
    """
    folder = mask_folder(output, mask_hash)
    mask = Mask.load(folder)
    if mask.hash != mask_hash:
        raise InputError(f"found a mask with hash {mask.hash}", mask_hash, where=folder)
    return mask


def keep_mask(mask: Mask, output: Path) -> str:
    """Save a mask under its hash, safely beside other processes that save the same one; returns the hash."""
    folder = mask_folder(output, mask.hash)
    if folder.exists():
        return mask.hash
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            own = Path(scratch) / "mask"
            mask.save(own)
            try:
                os.rename(own, folder)
            except OSError:
                # Another process saved the same mask first, atomically.
                if not folder.exists():
                    raise
        fsync_folder(folder.parent)
    return mask.hash
