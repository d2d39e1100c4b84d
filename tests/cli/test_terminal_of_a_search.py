"""A search on a terminal of 80 columns: one line for each bar, no broken words, nothing left of a live table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from irdscale.cli import command_line
from irdscale.cluster.live_table import table
from irdscale.search.engines import LocalEngine
from irdscale.utils import progress
from tests.screens import Screen, terminal
from tests.search.toy import write_config

pytestmark = pytest.mark.usefixtures("process_restored")
JOBS = [
    {
        "name": "k",
        "round": 1,
        "what": "8 samples, 20 trained, seed 0",
        "begun": 10.0,
        "host": "node-7",
        "step": 2,
        "of": 6,
    },
    {"name": "l", "begun": None, "host": None},
]


def test_a_screen_shows_what_a_terminal_would() -> None:
    screen = Screen(10)
    screen.write("one\r\ntwo\r\n\x1b[1A\x1b[2K\x1b[1mTWO\x1b[0m\r\n")
    assert screen.lines == ["one", "TWO", ""]
    assert not screen.wrapped
    screen.write("0123456789A")
    assert screen.lines[2:] == ["0123456789", "A"]
    assert screen.wrapped


@pytest.mark.parametrize("width", [80])
def test_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr("irdscale.report.write_report", lambda output: None)
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, search__max_rounds=1, search__seeds=[0], train__steps=2, fisher__samples=8)
    evaluate = LocalEngine.evaluate

    def with_jobs(self, candidates, ended):
        progress.show_below(table(JOBS))
        evaluate(self, candidates, ended)

    monkeypatch.setattr(LocalEngine, "evaluate", with_jobs)
    with terminal(monkeypatch, width) as screen:
        assert command_line.run(["search", str(config), "output=out"]) == 0
    frames = ["\n".join(frame) for frame in screen.frames]
    during = [frame for frame in frames if "node-7" in frame]
    assert during
    # The table is below the bars, drawn once.
    assert all(frame.count("node-7") == 1 for frame in during)
    assert any("Evaluations" in frame[: frame.index("node-7")] for frame in during)
    text = "\n".join(screen.lines)
    assert "node-7" not in text
    assert "waiting" not in text
    bars = [line for line in screen.lines if "━" in line]
    assert [line.split("━")[0].strip() for line in bars] == ["Sample traces", "Masks", "Evaluations"]
    assert "left" not in "".join(bars)
    assert "best " in bars[-1]
    long = [line for line in screen.lines if len(line) > width]
    assert long == []
    # Only a path may be longer than a line.
    paths = [line for line in screen.lines if str(tmp_path)[:20] in line]
    assert screen.wrapped == any(len(path) >= width for path in paths)
    best = json.loads((tmp_path / "out" / "result.json").read_text())["best"]
    (winner,) = [line for line in screen.lines if line.startswith("winner")]
    assert winner.split()[1:4] == [f"{best['samples']:,}", f"{best['params']:,}", f"{best['metric']:.4f}"]
