"""What the terminal says of the jobs on a cluster."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from irdscale.cluster import live_table as shown
from irdscale.cluster.live_table import cells, line_of, line_of_all, summed_up, table, watching
from irdscale.utils import progress

TRAINING = {
    "name": "k",
    "round": 2,
    "what": "8 samples",
    "begun": 10.0,
    "host": "a",
    "step": 20,
    "of": 60,
    "loss": 0.69314,
    "metric": 0.5,
}
WAITING = {"name": "search_masks", "what": "search masks", "begun": None, "host": None}
PASS = {**WAITING, "begun": 30.0, "host": "b", "progress": ("Fisher traces", 64.0, 256, "")}


def test_cells() -> None:
    assert cells(TRAINING) == ("2", "8 samples", "20/60", "0.6931", "0.5000", "20 s", "a")
    assert cells(WAITING) == ("", "search masks", "waiting", "", "", "", "")
    assert cells(WAITING | {"begun": 1.0}) == ("", "search masks", "starting", "", "", "", "")
    assert cells(PASS) == ("", "search masks", "64/256", "", "", "1 min 30 s", "b")
    assert cells(TRAINING | {"step": 0, "loss": 0.25})[2:6] == ("0/60", "0.2500", "0.5000", "")


def test_lines() -> None:
    assert line_of(TRAINING) == "8 samples, step 20/60, loss 0.6931, metric 0.5000, 20 s left"
    assert line_of(WAITING) == "search masks, waiting"
    assert line_of_all([WAITING, PASS]) == "Running: search masks, step 64/256, 1 min 30 s left; search masks, waiting"
    assert line_of_all([WAITING] * 9 + [PASS]) == "Running: search masks, step 64/256, 1 min 30 s left; 9 more, waiting"
    assert summed_up([TRAINING, PASS, WAITING]) == [TRAINING, PASS, WAITING]


def test_log_lines_and_jobs_are_told_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    supervisor = SimpleNamespace(
        look=SimpleNamespace(remote=lambda: {"logs": ["a line"], "jobs": [PASS, WAITING, WAITING]})
    )
    said: list[str] = []
    monkeypatch.setattr(ray, "get", lambda found, timeout: found)
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), width=100))
    for name, value in (("LOOK_S", 0.01), ("PLAIN_SECONDS", 0.0), ("say", said.append)):
        monkeypatch.setattr(shown, name, value)
    with watching(supervisor, enabled=True):
        until = time.monotonic() + 30
        while len(said) < 4 and time.monotonic() < until:
            time.sleep(0.01)
    expected = ["irdscale: a line", "Running: search masks, step 64/256, 1 min 30 s left; 2 more, waiting"]
    assert said[:4] == expected * 2


def test_the_table_stands_below_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=text, force_terminal=True, width=100))
    assert not progress.is_live()
    with progress.bar("Evaluations", 4) as advance:
        assert progress.is_live()
        progress.show_below(table([TRAINING, WAITING]))
        advance()
        progress._State.live.refresh()
        said = text.getvalue()
        text.truncate(0)
    assert said.rindex("Evaluations") < said.rindex("8 samples") < said.rindex("search masks")
    assert "8 samples" not in text.getvalue()


@pytest.mark.parametrize(
    ("width", "left_out"), [(60, set()), (50, {"on"}), (44, {"on", "round"}), (36, {"on", "round", "loss"})]
)
def test_a_narrow_terminal_leaves_whole_columns_out(width: int, left_out: set[str]) -> None:
    head, *rows = [line for line, _ in table([TRAINING, WAITING]).lines(width)]
    assert set(head.split()) == {"round", "running", "step", "loss", "metric", "left", "on"} - left_out
    assert all(len(line) <= width for line in (head, *rows))


def test_who_listens_hears_of_bars_and_none_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    text, heard = io.StringIO(), []
    monkeypatch.setattr(progress, "console", Console(file=text, width=100))
    with progress.progress_listener(lambda *facts: heard.append(facts)), progress.bar("Traces", 3) as advance:
        advance()
        advance(2, note="last")
    assert heard == [("Traces", 1.0, 3, ""), ("Traces", 3.0, 3, "last")]
    assert text.getvalue() == ""
