"""The texts of the samples with the largest and the smallest traces, as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.fisher.pool import draw_samples
from irdscale.report import write_report
from irdscale.report.sample_texts import CUT, Texts, cut, texts_of
from irdscale.tasks import load_task
from tests.pages import Cells
from tests.report.fake import write_output

MODEL = Path(__file__).resolve().parents[2] / "configs" / "models" / "stories260K"
HOSTILE = "<script>alert(1)</script> | `a` "
KINDS = {
    "causal-lm": ({"text": ["text"]}, lambda i: {"text": f"{HOSTILE}{i} " + "a long day " * 40}),
    "sft": (
        {"prompt": "q", "completion": "a"},
        lambda i: {"q": f"{HOSTILE}{i}", "a": "the dog ran"},
    ),
    "sequence-classification": (
        {"text": ["text"], "label": "topic"},
        lambda i: {"text": f"{HOSTILE}{i}", "topic": f"topic {i % 12}"},
    ),
}


def config_of(folder: Path, kind: str) -> RunConfig:
    columns, row = KINDS[kind]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row(i)) + "\n" for i in range(240)))
    file = folder / "run.yaml"
    file.write_text(
        json.dumps(
            {
                "model": {"path": str(MODEL)},
                "task": {"kind": kind, "dataset": str(data), "columns": columns, "max_length": 512},
                "fisher": {"samples": 24},
                "output": str(folder / "out"),
            }
        )
    )
    return load_config(file)


@pytest.mark.parametrize("kind", list(KINDS))
def test_texts_are_those_of_the_drawn_samples(tmp_path: Path, kind: str) -> None:
    config = config_of(tmp_path, kind)
    task = load_task(config)
    rows = list(task.population.select(draw_samples(config, task, 24, "pool"))["row"])
    found = texts_of(config, {"row": rows}, [3, 0, 3])
    assert found.missing is None
    assert sorted(found.of) == [0, 3]
    for place, text in found.of.items():
        assert text.startswith(f"{HOSTILE}{rows[place]}")
        assert len(text) <= CUT
    assert (found.of[0][-1] == "…") == (kind == "causal-lm")
    names = [f"topic {i}" for i in range(12)] if kind == "sequence-classification" else []
    assert sorted(found.label_names) == sorted(names)


def test_data_that_is_gone_or_another_is_one_line(tmp_path: Path) -> None:
    config = config_of(tmp_path, "sft")
    other = texts_of(config, {"row": [0] * 24}, [0])
    assert other.of == {}
    assert "found other samples than the search; expected the same." in str(other.missing)
    (tmp_path / "data.jsonl").unlink()
    gone = texts_of(config, {"row": [0] * 24}, [0])
    assert str(gone.missing).startswith("The texts of the samples are not shown: ")
    assert str(gone.missing).endswith("data.jsonl: no such file or folder.")
    assert "\n" not in str(gone.missing)


def test_cut() -> None:
    assert cut("a\n b\t c ") == "a b c"
    assert cut("x" * CUT) == "x" * CUT
    assert len(cut("x" * (CUT + 1))) == CUT


def shown(folder: Path, monkeypatch: pytest.MonkeyPatch, texts: Texts) -> tuple[Cells, str]:
    monkeypatch.setattr("irdscale.report.facts.read_texts", lambda *args: texts)
    monkeypatch.setattr("irdscale.report.write.draw_all", lambda facts: {})
    write_report(write_output(folder))
    return Cells((folder / "report.html").read_text()), (folder / "report.md").read_text()


def test_the_highest_and_the_lowest_ten_are_shown_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts({place: f"{HOSTILE}{place}" for place in range(32)}, ["<i>good</i>", "bad"])
    page, markdown = shown(tmp_path, monkeypatch, texts)
    assert not {"script", "i"} & set(page.tags), "texts and class names are escaped"
    listed: list[list[Any]] = [row for row in page.rows if row and row[-1].startswith("<script>")]
    assert [row[0] for row in listed] == [str(row) for row in (*range(31, 21, -1), *range(9, -1, -1))]
    assert listed[0] == ["31", "6.06 %", "32", "8", "1", "bad", f"{HOSTILE}31"]
    assert listed[-1][-2:] == ["<i>good</i>", f"{HOSTILE}0"]
    assert r"| bad | \<script\>alert(1)\</script\> \| \`a\` 31 |" in markdown
    assert "<script>" not in markdown
    assert ["<i>good</i>", "16", "16"] in page.rows, "class by its name, samples, mean trace"


def test_without_texts_the_report_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, markdown = shown(tmp_path, monkeypatch, Texts(missing="The texts of the samples are not shown: gone <b>."))
    assert "not shown: gone <b>." in page.text
    assert r"not shown: gone \<b\>." in markdown
    assert ["31", "6.06 %", "32", "8", "1", "1"] in page.rows
