"""What a search keeps of its samples and masks in its output folder, and how it is read again."""

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
    """Where a search starts and ends, and the hash of the mask of every pair in between.

    Attributes:
        facts: parameters of the model, scored ones and which they are, the head's, sample gradients taken, seconds.
    """

    start: Pair
    minimum: Pair
    masks: dict[Pair, str]
    facts: dict[str, Any]

    @property
    def fewest(self) -> Pair:
        """The fewest samples of the search, with its most parameters."""
        return Pair(min(pair.samples for pair in self.masks), self.start.params)


def mask_folder(output: Path, mask_hash: str) -> Path:
    """Where a mask of this hash is kept."""
    return output / "masks" / mask_hash


def index_file(output: Path, name: str = "") -> Path:
    """Where the list of a search's masks is; `name` tells several searches in one folder apart."""
    return output / "fisher" / name / "masks.json"


def traces_file(output: Path, name: str = "") -> Path:
    """Where the traces of a search's samples are."""
    return output / "fisher" / name / "traces.json"


def as_stored(masks: SearchMasks, made_by: str) -> dict[str, Any]:
    """What the list of a search's masks holds; `made_by` tells its configuration."""
    return {
        "start": [masks.start.samples, masks.start.params],
        "minimum": [masks.minimum.samples, masks.minimum.params],
        "masks": [[pair.samples, pair.params, mask] for pair, mask in masks.masks.items()],
        "facts": masks.facts,
        "made_by": made_by,
    }


def read_masks(index: Path) -> tuple[SearchMasks, str]:
    """A search's list of masks, and what tells the configuration that they were made by.

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
        raise InputError(f"{index}: not a list of masks: no valid {error}; delete the folder to start anew") from error


def load_mask(output: Path, mask_hash: str) -> Mask:
    """The mask of this hash.

    Raises:
        InputError: it is missing or damaged, or another one.
    """
    folder = mask_folder(output, mask_hash)
    mask = Mask.load(folder)
    if mask.hash != mask_hash:
        raise InputError(f"{folder}: found another mask; expected the one of this hash")
    return mask


def keep_mask(mask: Mask, output: Path) -> str:
    """Save a mask under its hash, once, whoever else saves it at the same time; returns the hash."""
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
                # Another job has made the same mask meanwhile, and what is there is whole.
                if not folder.exists():
                    raise
        fsync_folder(folder.parent)
    return mask.hash
