"""Where the masks of a comparison lie, as its report tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from irdscale.compare import write_comparison
from irdscale.compare.where import COLUMNS, where_masks_lie
from irdscale.errors import InputError
from irdscale.masks.mask import Mask
from irdscale.search.mask_store import keep_mask, mask_folder
from tests.compare.fake import study, write_study
from tests.pages import Cells

SHAPES = {"word": (9, 20), "<pooler>": (5, 4)}


def mask(word: int, pooler: int) -> Mask:
    return Mask({"word": torch.arange(word), "<pooler>": torch.arange(pooler)}, SHAPES)


def test_all_seeds_together_and_only_masks_that_are_there(tmp_path: Path) -> None:
    compared = study({key: [0.7, 0.71] for key in ("ird", "fish", "random_mask", "full")})
    of = {"ird": [mask(2, 8), mask(4, 6)], "random_mask": [mask(9, 1), mask(9, 1)]}
    for method in compared["methods"]:
        for one, kept in zip(method["seeds"], of.get(method["name"], ()), strict=False):
            one["mask"] = keep_mask(kept, tmp_path)
    rows = [["IRD", "<pooler>", "70 %", "10 %"], ["random mask", "word", "90 %", "90 %"]]
    assert where_masks_lie(tmp_path, compared) == rows
    write_comparison(write_study(tmp_path, compared))
    page = Cells((tmp_path / "compare.html").read_text())
    assert all(row in page.rows for row in rows)
    assert r"| IRD | \<pooler\> | 70 % | 10 % |" in (tmp_path / "compare.md").read_text()
    (mask_folder(tmp_path, mask(4, 6).hash) / "mask.safetensors").write_text("x")
    with pytest.raises(InputError, match=r"mask\.safetensors"):
        where_masks_lie(tmp_path, compared)


def test_nothing_is_told_without_masks(tmp_path: Path) -> None:
    write_comparison(write_study(tmp_path, study({"ird": [0.7, 0.71], "full": [0.7, 0.71]})))
    assert "Where the masks lie" not in (tmp_path / "compare.md").read_text()
    assert COLUMNS[1] not in (tmp_path / "compare.html").read_text()
