"""The analysis of samples and masks, against scipy and against counting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from irdscale.masks.mask import Mask
from irdscale.report import write_report
from irdscale.report.analysis import drivers
from irdscale.report.facts import gather
from irdscale.report.mask_overlap import by_layer, concentration, most_held, overlaps
from irdscale.report.relations import (
    Relation,
    eta_squared,
    headline,
    larger_probability,
    partial_spearman,
    relations,
    spearman,
)
from irdscale.utils.files import write_json
from tests.pages import Cells
from tests.report.fake import write_output

SHAPES = {"wte.weight": (40,), "h.0.w": (30,), "h.0.b": (10,), "h.11.w": (20,)}


def mask(**indices: list[int]) -> Mask:
    names = {"e": "wte.weight", "a": "h.0.w", "b": "h.0.b", "z": "h.11.w"}
    return Mask({names[k]: torch.tensor(v, dtype=torch.int32) for k, v in indices.items()}, SHAPES)


def numbers(seed: int, count: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three columns that depend on each other, with ties."""
    generator = np.random.default_rng(seed)
    a = generator.integers(0, 15, count)
    b = a + generator.integers(0, 10, count)
    return a, b, a - b + generator.integers(0, 20, count)


def test_rank_statistics_are_those_of_scipy() -> None:
    a, b, c = numbers(0)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-11)
    assert spearman(a, np.ones(40)) is None
    # What is left of the ranks of both after a regression on the ranks held.
    x, y, z = map(stats.rankdata, (a, b, c))
    left = [v - np.polyval(np.polyfit(z, v, 1), z) for v in (x, y)]
    assert partial_spearman(a, b, c) == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-9)
    assert partial_spearman(a, b, b) is None
    classes = [int(v) % 3 for v in c]
    groups = [b[[k == one for k in classes]] for one in range(3)]
    h = stats.kruskal(*groups).statistic
    ties = stats.tiecorrect(stats.rankdata(b))
    assert ties < 1
    assert eta_squared(b, classes) == pytest.approx(h / 39, rel=1e-9), "H is corrected for ties, as the variance is"
    flags = [bool(v > 3) for v in c]
    u = stats.mannwhitneyu(b[flags], b[[not f for f in flags]]).statistic
    assert larger_probability(b, flags) == pytest.approx(u / (sum(flags) * (40 - sum(flags))), rel=1e-12)


def traces(**changes: Any) -> dict[str, Any]:
    known = {"length": [10, 20, 30, 40, 50, 60, 70, 80], "label": [0, 1] * 4, "loss": [1.0, 3, 2, 5, 4, 8, 7, 6]}
    return known | changes


@pytest.mark.parametrize(
    ("trace", "kind", "known", "expected"),
    [
        (
            [8, 7, 6, 5, 4, 3, 2, 1],
            "sequence-classification",
            {},
            "The ranking is largely length in disguise: Spearman -1.00 with length (-1.00 with loss held). It also "
            "follows loss: Spearman -0.86 with loss.",
        ),
        (
            [4, 8, 1, 7, 2, 6, 3, 5],
            "sequence-classification",
            {},
            "The ranking is largely class in disguise: the class explains 76.2 % of the variance of its ranks.",
        ),
        (
            [3, 8, 1, 6, 2, 5, 7, 4],
            "sequence-classification",
            {"loss": [1.0] * 8},
            "There is no sign that the ranking is length or class in disguise",
        ),
        (
            [1.0, 4, 9, 16, 16.5, 9.5, 4.5, 1.5],
            "regression",
            {"label": [0.0, 1, 2, 3, 4, 5, 6, 7], "length": [9] * 8},
            "The ranking is largely distance of the label from the mean in disguise: Spearman -0.98 with",
        ),
    ],
)
def test_headline(trace: list[float], kind: str, known: dict[str, Any], expected: str) -> None:
    assert headline(relations(trace, traces(**known), kind), "ranking").startswith(expected)


def test_a_relation_above_chance_is_not_called_none() -> None:
    rows = 200
    places = np.random.default_rng(0).permutation(rows)
    values = np.arange(rows) + 2.5 * places
    known = {"length": list(range(rows)), "loss": [1.0] * rows, "label": [0, 1] * 100}
    faint = relations(values, known, "sequence-classification")
    assert 0.14 < faint[0].value < 0.3
    said = headline(faint, "ranking")
    assert said.startswith("The ranking follows length a little, more than by chance: Spearman +0.26 with")
    assert "by chance ±0.14. There is no sign that the ranking is class in disguise: the class explains" in said


def test_a_relation_that_another_one_hides_is_not_called_none() -> None:
    """Of no relation with the loss as it is, and a strong one with the length held."""
    hidden = Relation("loss", "Spearman", 0.05, (-0.14, 0.14), 0.0, held=0.4)
    said = headline([hidden], "ranking")
    assert said.startswith("The ranking follows loss a little, more than by chance: Spearman +0.05 with loss (+0.40")
    assert "no sign" not in said


def test_few_samples_prove_nothing() -> None:
    known = {"length": [1, 2, 3, 4, 5], "label": [1, 2, 3, 4, 5], "loss": [1.0, 2, 4, 5, 3]}
    found = relations([2.0, 1, 4, 3, 5], known, "causal-lm")
    assert [(r.name, r.measure) for r in found] == [("length", "Spearman"), ("loss", "Spearman")]
    assert found[0].value == pytest.approx(0.8)
    assert found[0].chance == pytest.approx((-0.98, 0.98))
    assert headline(found, "trace").startswith("There is no sign that the trace is length or loss in disguise")


def test_masks_by_layer_and_in_common() -> None:
    large = mask(e=[0, 1, 2, 3], a=[5, 6, 7], z=[1, 2, 3])
    middle = mask(e=[0, 1, 2], a=[5, 6], b=[1], z=[1, 2, 3, 4])
    small = mask(e=[3], a=[7, 8], b=[1], z=[3, 4, 5, 6, 7, 8])
    found = overlaps({"8": large, "4": middle, "2": small}, 10)
    assert found.shares == [[1.0, 0.8, 0.3], [0.8, 1.0, 0.3], [0.3, 0.3, 1.0]]
    assert found.chance == 10 / 100
    layers = by_layer([large, middle, small])
    assert [layer.name for layer in layers] == ["0", "11", "other"]
    assert [layer.shares for layer in layers] == [[0.3, 0.3, 0.3], [0.3, 0.4, 0.6], [0.4, 0.3, 0.1]]
    assert [layer.kept for layer in layers] == [1 / 3, 1 / 6, 1.0]
    assert [layer.chance for layer in layers] == [3 / 40, 3 / 20, 4 / 40]
    assert layers[1].gain == pytest.approx(0.3)
    assert by_layer([large, mask(e=[0])])[0].kept is None


def test_one_parameter_that_holds_most_of_a_mask_is_named(tmp_path: Path) -> None:
    shapes = {"pooler": (5, 4), "word": (9, 20)}

    def of(pooler: int, word: int) -> Mask:
        return Mask({"pooler": torch.arange(pooler), "word": torch.arange(word)}, shapes)

    assert most_held([of(7, 3), of(8, 2)]) == ("pooler", 0.75, 0.1)
    assert most_held([Mask({}, shapes)]) is None
    said = concentration(of(6, 4))
    assert said is not None
    assert said.startswith("60 % of the mask's entries are in pooler, which has 10 % of the scored parameters: ")
    assert "fisher.exclude" in said
    assert "fisher.scope=layerwise" in said
    assert concentration(of(5, 5)) is None, "no more than half"
    assert concentration(of(0, 10)) is None, "no more than its size gives it"
    assert concentration(Mask({}, shapes)) is None
    write_output(tmp_path)
    best = json.loads((tmp_path / "result.json").read_text())["best"]
    query = {"bert.encoder.layer.0.attention.self.query.weight": torch.arange(20)}
    held = Mask(query, Mask.load(tmp_path / best["mask"]).shapes)
    held.save(tmp_path / "masks" / held.hash)
    change(tmp_path, "result.json", best={**best, "mask": f"masks/{held.hash}"})
    said = "entries are in bert.encoder.layer.0.attention.self.query.weight, which has 13.3 %"
    assert all(said in page for page in pages(tmp_path))


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
    assert "An altered sample ranks above another with probability 1.00" in html
    assert "12.5 % of the pool and 25 % of the smallest set, of 16 samples" in html
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
    for name in ("overlap", "drift"):
        assert f"(figures/{name}.png)" in markdown
        assert (tmp_path / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")


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
