"""The analysis of samples and masks in a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from irdscale.masks.mask import Mask
from irdscale.report import write_report
from irdscale.report.analysis import drivers
from irdscale.report.facts import gather
from irdscale.report.relations import spearman
from irdscale.utils.files import write_json
from tests.pages import Cells
from tests.report.fake import write_output


def test_drivers() -> None:
    known = {"row": [10, 11, 12, 13], "trace": [4.0, 1.0, 2.0, 3.0], "length": [5, 6, 7, 8], "label": [0, 0, 1, 1]}
    known["loss"] = [1.0] * 4
    found = drivers({"place": [3, 0, 2], "share": [0.3, 0.4, 0.3]}, known)
    assert (found.samples, found.half) == (3, 2)
    assert [(one["row"], one["share"], one["loss"]) for one in found.top] == [
        (10, pytest.approx(0.4), 1.0),
        (13, pytest.approx(0.3), 1.0),
        (12, pytest.approx(0.3), 1.0),
    ]
    assert found.correlations == {"length": pytest.approx(spearman([0.3, 0.4, 0.3], [8, 5, 7]))}


def change(folder: Path, name: str, **keys: Any) -> None:
    file = folder / name
    write_json(file, json.loads(file.read_text()) | keys)


def pages(folder: Path) -> tuple[str, str]:
    write_report(folder)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_one_parameter_that_holds_most_of_a_mask_is_in_the_report(tmp_path: Path) -> None:
    write_output(tmp_path)
    best = json.loads((tmp_path / "result.json").read_text())["best"]
    query = {"bert.encoder.layer.0.attention.self.query.weight": torch.arange(20)}
    held = Mask(query, Mask.load(tmp_path / best["mask"]).shapes)
    held.save(tmp_path / "masks" / held.hash)
    change(tmp_path, "result.json", best={**best, "mask": f"masks/{held.hash}"})
    said = "entries are in bert.encoder.layer.0.attention.self.query.weight, which has 13.3 %"
    assert all(said in page for page in pages(tmp_path))


def test_the_section_of_a_report(tmp_path: Path) -> None:
    write_output(tmp_path)
    losses = [abs(15.5 - i) for i in range(32)]
    altered = [i >= 28 for i in range(32)]
    change(tmp_path, "fisher/traces.json", loss=losses, altered=altered)
    best = json.loads((tmp_path / "result.json").read_text())["best"]["mask"].removeprefix("masks/")
    shares = [0.26] * 2 + [0.48 / 30] * 30
    write_json(tmp_path / "fisher/drivers.json", {"mask": best, "place": list(range(31, -1, -1)), "share": shares})
    markdown, html = pages(tmp_path)
    rows = Cells(html).rows
    assert (
        "Of their 40 entries, the masks of neighbouring sample sets share 97.5 %; random masks would share 8.33 %"
        in (html)
    )
    assert ["32", "12.5 %"] in rows
    assert ["16", "25 %"] in rows
    assert ["31", "6.06 %", "32", "8", "15.5", "1"] in rows, "row, share of the traces, trace, length, loss, label"
    assert ["0", "16", "16"] in rows, "class, samples, mean trace"
    assert ["altered", "AUC", "1.00", "0.19 to 0.81", ""] in rows
    assert ["0", "5 %", "5.13 %", "+0.1", "100 %", "2.78 %"] in rows
    assert "2 of the 32 samples behind the winner's mask hold half" in html
    assert ["31", "26 %", "32", "8", "15.5", "1"] in rows
    rho = stats.spearmanr(range(32), [5 + i % 7 for i in range(32)]).statistic
    assert f"| length | Spearman | {rho:+.2f} | ±0.35 |" in markdown
    assert "2 of the 32 samples behind the winner's mask hold half" in markdown
    assert "(figures/overlap.png)" in markdown
    assert (tmp_path / "figures/overlap.png").read_bytes().startswith(b"\x89PNG")


def test_drivers_of_another_mask(tmp_path: Path) -> None:
    write_output(tmp_path)
    write_json(tmp_path / "fisher/drivers.json", {"mask": "of another search", "place": [0], "share": [1.0]})
    found = gather(tmp_path).analysis
    assert found.drivers is None
    assert {r.name for r in found.relations} == {"length", "class"}
    assert found.altered == []
    assert pages(tmp_path)[0].count("hold half") == 0


def test_an_order_that_is_not_the_traces_is_what_is_analysed(tmp_path: Path) -> None:
    write_output(tmp_path)
    lengths = [5 + i % 7 for i in range(32)]
    order = sorted(range(32), key=lambda i: -lengths[i])
    change(tmp_path, "fisher/traces.json", order=order)
    found = gather(tmp_path).analysis
    assert found.relations[0].name == "the trace"
    assert found.sentences[0].startswith("The ranking is largely length in disguise: Spearman +0.99")
    change(tmp_path, "result.json", direction="random")
    shuffled = gather(tmp_path).analysis
    assert shuffled.ranked == "trace"
    assert shuffled.relations[0].name == "length"
    assert shuffled.relations[0].value == pytest.approx(stats.spearmanr(range(32), lengths).statistic)


def test_a_single_sample_set_has_no_overlaps(tmp_path: Path) -> None:
    write_output(tmp_path)
    stored = json.loads((tmp_path / "fisher/masks.json").read_text())
    kept = next(mask for s, _, mask in stored["masks"] if s == 32)
    change(tmp_path, "fisher/masks.json", masks=[[s, p, kept] for s, p, _ in stored["masks"]])
    found = gather(tmp_path).analysis
    assert (found.overlap, found.layers) == (None, [])
    assert "The masks of all sample sets are the same." in found.sentences
    assert "overlap.png" not in pages(tmp_path)[0]
