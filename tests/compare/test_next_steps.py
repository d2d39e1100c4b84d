"""A comparison says what to do next, explains its terms, shows its samples, and fits the screen."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from irdscale.compare import write_comparison
from irdscale.compare.next_steps import next_steps
from irdscale.compare.samples import Samples
from irdscale.config.loader import load_config
from tests.compare.fake import around, everything, study, write_study
from tests.pages import Cells, least_widths


def asked(compared: dict[str, Any], output: Path) -> tuple[str, list[list[str]]]:
    """The paragraph, and the verb and the changes of each command."""
    text, commands = next_steps(compared, output)
    words = [shlex.split(line) for line in commands]
    places = [each.index(str(output / "config.yaml")) for each in words]
    return text, [[each[place - 1], *each[place + 1 :]] for each, place in zip(words, places, strict=True)]


def test_a_search_that_pays_is_used(tmp_path: Path) -> None:
    text, commands = asked(study({"ird": around(0.75), "fish": around(0.70, turn=1)}), tmp_path)
    assert text.startswith("For now, use IRD: IRD is better than one FISH mask beyond the chance of the seeds.")
    assert commands == [["search", f"output={tmp_path}-ird", "train.learning_rate=0.003"]]


def test_a_search_that_does_not_pay_is_not(tmp_path: Path) -> None:
    text, commands = asked(study({"ird": around(0.70), "fish": around(0.70, turn=1)}), tmp_path)
    assert "use FISH: nothing shows that the search is better than one FISH mask, which costs less" in text
    assert [line[0] for line in commands] == ["train"]


def test_another_method_is_named(tmp_path: Path) -> None:
    text, commands = asked(study({"ird": around(0.70), "fish": around(0.69), "lora": around(0.8)}), tmp_path)
    assert text == "For now, use LoRA: LoRA has the best mean on the selection split."
    assert commands == []


def test_few_seeds_and_a_narrow_grid_ask_for_more(tmp_path: Path) -> None:
    compared = study({"ird": around(0.7, 2), "fish": around(0.6, 2)})
    compared["methods"][1]["learning_rate"] = 0.01
    text, commands = asked(compared, tmp_path)
    assert "Compare with 5 seeds and more learning rates: the same folder keeps what is done already." in text
    changes = ["compare.seeds=[0,1,2,3,4]", "compare.learning_rates=[0.001,0.003,0.01,0.03]"]
    assert commands[0] == ["compare", f"output={tmp_path}", *changes]
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: m}\ntask: {dataset: glue/rte}\noutput: out\n")
    assert load_config(file, commands[0][1:]).compare.seeds == [0, 1, 2, 3, 4]


def test_failures_come_first(tmp_path: Path) -> None:
    text, _ = asked(study({"ird": around(0.75), "fish": around(0.7), "full": [None] * 5}), tmp_path)
    assert text.startswith("5 training(s) failed; remove their cause")
    text, commands = asked(study({"ird": [None], "fish": [0.7]}), tmp_path)
    assert text.startswith("IRD failed for every seed.")
    assert commands == [["compare", f"output={tmp_path}"]]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cells:
    """The page of all methods, without figures, and with samples whose texts are hostile."""
    one = {"place": 0, "row": 7, "share": 0.1, "trace": 3.0, "length": 5, "loss": 0.5, "label": "<i>good</i>"}
    hostile = [{**one, "text": f"<script>alert({i})</script>"} for i in range(2)]
    samples = Samples(["Some samples."], [], [], hostile[:1], hostile[1:])
    monkeypatch.setattr("irdscale.compare.report.about_samples", lambda *args: samples)
    monkeypatch.setattr("irdscale.compare.report.draw_all", lambda compared: {})
    compared = everything()
    for method in compared["methods"]:
        method["test_error"] = 0.0213
    write_comparison(write_study(tmp_path, compared))
    assert "<script>" not in (tmp_path / "compare.md").read_text()
    return Cells((tmp_path / "compare.html").read_text())


def test_samples_are_text(page: Cells) -> None:
    assert not {"script", "i"} & set(page.tags)
    assert ["7", "10 %", "3", "5", "0.5", "<i>good</i>", "<script>alert(0)</script>"] in page.rows
    assert ["7", "10 %", "3", "5", "0.5", "<i>good</i>", "<script>alert(1)</script>"] in page.rows


def test_the_widest_table_fits(page: Cells) -> None:
    assert [len(table[1][0]) for table in page.tables[:2]] == [8, 14]
    assert max(least_widths(page)) < 1160


def test_terms_are_explained_where_they_are_first_used(page: Cells) -> None:
    begin = page.text.index("A mask is")
    for term in ("mask", "Fisher information", "Fisher trace", "FISH mask", "IRD", "seed", "reference", "accuracy"):
        found = [place for name, place in page.terms if name.lower() in term.lower()]
        first = re.search(rf"\b{re.escape(term.split()[0] if term == 'FISH mask' else term)}\b", page.text[begin:])
        assert first is not None
        assert begin + first.start() in found, term
    assert "What to do next" in page.text
