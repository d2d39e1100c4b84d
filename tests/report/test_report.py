"""Reports say what the files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from irdscale.errors import InputError
from irdscale.report import write_report
from irdscale.report.facts import gather
from irdscale.report.next_steps import next_steps
from irdscale.report.verdict import verdict
from irdscale.search.ird import Pair
from tests.pages import Cells
from tests.report.fake import write_output


def report(folder: Path, **changes: object) -> tuple[str, str]:
    write_report(write_output(folder, **changes))  # type: ignore[arg-type]
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def of_fewer_samples(folder: Path) -> dict[str, Any]:
    """The result, as if the search had begun with more samples than its winner has."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    result["path"][0]["samples"] = 64
    return result


def test_tables_hold_the_figures_of_the_files(tmp_path: Path) -> None:
    markdown, html = report(tmp_path)
    rows = Cells(html).rows
    assert ["winner", "32", "20", "0.7500", "0.7300", "0.7200", "0.7400"] in rows
    assert ["random samples (FISH)", "32", "20", "0.7100", "0.6900", "0.6800", "0.7000"] in rows
    assert ["head alone (linear probe)", "–", "0", "0.6000", "0.5800", "0.5700", "0.5900"] in rows
    assert ["0", "32", "40", "0.7000", "0.6900", "0.7100", "chosen"] in rows
    assert ["1", "32", "20", "0.7500", "0.7400", "0.7600", "chosen"] in rows
    assert ["1", "16", "20", "0.7500", "0.7400", "0.7600", "same mask as an earlier pair"] in rows
    assert ["1", "16", "40", "0.7200", "0.7100", "0.7300", ""] in rows
    assert ["bert.embeddings.word_embeddings.weight", "18", "400", "4.5 %"] in rows
    assert ["selection", "436", "half of validation"] in rows
    assert "| **winner** | 32 | 20 | 0.7500 | 0.7300 |" in markdown
    assert "| 1 | 16 | 20 | 0.7500 | 0.7400 | 0.7600 |  same mask as an earlier pair |" in markdown
    assert "64 sample gradients" in markdown
    assert "1,234 training steps" in html
    times = "Time: 3.0 s Fisher passes and masks, 40 s candidates, 9.0 s baselines, 2.0 s test split, 54 s in total."
    assert times in html
    assert times in markdown
    for name in re.findall(r"\]\((figures/\w+\.png)\)", markdown):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "figures").iterdir())) == 5


def test_html_is_one_file(tmp_path: Path) -> None:
    page = Cells(report(tmp_path)[1])
    assert len(page.loads) == 5
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not {"link", "script", "iframe"} & set(page.tags)


def test_facts(tmp_path: Path) -> None:
    facts = gather(write_output(tmp_path))
    assert [kept for _, kept in facts.traces] == [True] * 32
    assert [value for value, _ in facts.traces] == sorted((value for value, _ in facts.traces), reverse=True)
    assert facts.layers == {0: {"attention.self.query": 2 / 72}, 1: {"output.LayerNorm": 0.0}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"fish": 0.71},
            "better than random samples (FISH, the same s and p) for every seed (0.6900; difference +0.0400",
        ),
        ({"fish": 0.80}, "worse than random samples (FISH, the same s and p) for every seed"),
        (
            {"same_mask": True},
            "There is no comparison with random samples (FISH, the same s and p): both have the same mask",
        ),
        ({"seeds": (3,)}, "but one seed cannot tell a difference from chance"),
        ({"probe": None}, "there is no linear probe to compare with"),
        ({"probe": 0.60}, "better than the head alone (linear probe) for every seed (0.5800; difference +0.1500"),
        ({"fish": 0.75}, "the same as random samples"),
    ],
)
def test_verdict(changes: dict[str, object], expected: str, tmp_path: Path) -> None:
    write_output(tmp_path, **changes)  # type: ignore[arg-type]
    text = " ".join(verdict(of_fewer_samples(tmp_path)))
    assert expected in text
    assert "20 of the model's 5,000 parameters (0.4 %)" in text
    assert "a new head of 18" in text


def test_seeds_that_disagree_prove_nothing(tmp_path: Path) -> None:
    write_output(tmp_path)
    result = of_fewer_samples(tmp_path)
    fish = result["baseline"]["fish_random"]
    for one, test in zip(fish["seeds"], (0.75, 0.70), strict=True):
        one["test_metric"] = test
    fish["test_metric"] = 0.725
    text = " ".join(verdict(result))
    assert "It cannot be distinguished from random samples" in text
    assert "by seed -0.0300 to +0.0400" in text


@pytest.mark.parametrize(
    ("gains", "expected", "advice"),
    [
        # Better for every seed, by chance; better beyond chance, though not for every seed.
        (
            (0.001, 0.001, 0.001, 0.001, 0.2),
            "cannot be distinguished from random samples (FISH, the same s and p) (0.6892; difference +0.0408, by seed "
            "+0.0010 to +0.2000; 95 % interval -0.0697 to +0.1513).",
            "The seeds do not tell the winner from random samples",
        ),
        (
            (0.05, 0.05, 0.05, 0.05, -0.001),
            "better than random samples (FISH, the same s and p) (0.6902; difference +0.0398, by seed -0.0010 to "
            "+0.0500; 95 % interval +0.0115 to +0.0681).",
            "The winner beats random samples beyond the chance of the seeds",
        ),
    ],
)
def test_the_interval_of_the_seeds_decides(
    gains: tuple[float, ...], expected: str, advice: str, tmp_path: Path
) -> None:
    write_output(tmp_path, seeds=tuple(range(5)))
    result = of_fewer_samples(tmp_path)
    best, fish = result["best"], result["baseline"]["fish_random"]
    best["test_metric"] = 0.73
    for one, other, gain in zip(best["seeds"], fish["seeds"], gains, strict=True):
        one["test_metric"], other["test_metric"] = 0.73, 0.73 - gain
    fish["test_metric"] = 0.73 - sum(gains) / 5
    assert expected in " ".join(verdict(result))
    assert advice in next_steps(result, tmp_path)[0]


@pytest.mark.parametrize("direction", ["ird", "reverse", "random"])
def test_a_fish_mask_is_not_compared_with_another(direction: str, tmp_path: Path) -> None:
    write_output(tmp_path, seeds=(0, 1, 2, 3, 4))
    kept_all = json.loads((tmp_path / "result.json").read_text()) | {"direction": direction}
    text = " ".join(verdict(kept_all))
    assert "its mask is a FISH mask, and this result says nothing about the ranking" in text
    assert "gave 0.6900; difference +0.0400, which is chance of the draw" in text
    assert "than random samples" not in text
    fewer = " ".join(verdict(of_fewer_samples(tmp_path) | {"direction": direction}))
    assert ("its mask is a FISH mask" in fewer) == (direction == "random")
    assert ("better than random samples" in fewer) == (direction != "random")


def test_failures_are_shown(tmp_path: Path) -> None:
    markdown, html = report(tmp_path, fail=Pair(16, 40))
    assert "16 samples, 40 parameters, seed 1: RunError: the loss is nan &lt;b&gt;" in html
    assert r"seed 1: RunError: the loss is nan \<b\>" in markdown
    assert ["1", "16", "40", "failed", "0.7100", "failed", ""] in Cells(html).rows


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    markdown, html = report(tmp_path, name="<script>alert(1)</script>|x")
    assert "script" not in Cells(html).tags
    assert "&lt;script&gt;" in html
    assert "<script>" not in markdown


def test_a_shaped_population_is_said(tmp_path: Path) -> None:
    write_output(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    result["task"]["pool"] = "90 % of class <b> (9 of 10 samples)"
    (tmp_path / "result.json").write_text(json.dumps(result))
    write_report(tmp_path)
    assert r"not of the train split: 90 % of class \<b\> (9 of 10 samples)." in (tmp_path / "report.md").read_text()
    assert (
        "not of the train split: 90 % of class &lt;b&gt; (9 of 10 samples)." in (tmp_path / "report.html").read_text()
    )


def test_a_failed_baseline(tmp_path: Path) -> None:
    write_output(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    broken = {"metric": None, "test_metric": None, "error": "RunError: nan"}
    result["baseline"]["linear_probe"] |= broken
    for one in result["baseline"]["linear_probe"]["seeds"]:
        one["metric"] = None
        del one["test_metric"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    write_report(tmp_path)
    assert (
        "There is no test metric of the head alone (linear probe): RunError: nan."
        in (tmp_path / "report.html").read_text()
    )


def test_unfinished_or_broken(tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/result.json").write_text('{"kept_step": 8}')
    with pytest.raises(InputError, match="trained: found a training; expected a finished search: run irdscale search"):
        write_report(tmp_path / "trained")
    with pytest.raises(InputError, match="found no search; expected a finished one: run irdscale search"):
        write_report(tmp_path / "nothing")
    write_output(tmp_path)
    whole = (tmp_path / "result.json").read_text()
    for broken, message in ((whole[:100], "not a result of a search"), ("{}", "not the output of a search: KeyError")):
        (tmp_path / "result.json").write_text(broken)
        with pytest.raises(InputError, match=message):
            write_report(tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(InputError, match="found a search with 6 evaluations done; expected a finished one"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
