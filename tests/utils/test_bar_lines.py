import io

import pytest
from rich.console import Console

from irdscale.utils import progress
from irdscale.utils.bar_lines import DRAWN_BAR, FIELDS, LONGEST, fields_of, fitting

SHOWN = {"best": 0.76, "loss": 0.25, "method": "lora", "note": "128 samples, 113,570 trained, seed 1"}


def lines(monkeypatch, width):
    """The lines of two open bars on a terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=True, width=width, _environ={}))
    with progress.bar("Evaluations", 1200) as outer, progress.bar("Sample traces", 32) as inner:
        outer(600, **SHOWN)
        inner(4)
        plain = Console(file=io.StringIO(), width=width)
        plain.print(*progress._State.live.get_renderables())
    return plain.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
def test_every_bar_is_one_line_with_whole_numbers(monkeypatch, width):
    shown = lines(monkeypatch, width)
    assert len(shown) == 2
    assert all(len(line.rstrip()) <= width for line in shown)
    assert "600/1,200" in shown[0]
    assert "4/32" in shown[1]
    words = " ".join(shown).replace("━", "").replace("╸", "").replace("╺", "")
    assert "best" not in words or "best 0.7600" in words
    assert "trained" not in words or SHOWN["note"] in words


def test_the_fields_stand_below_each_other(monkeypatch):
    first, second = lines(monkeypatch, 120)
    assert first.index("600/1,200") + len("600/1,200") == second.index("4/32") + len("4/32")
    assert first.split()[0] == "Evaluations"
    assert second.startswith("Sample traces")


def test_whole_fields_are_left_out_in_the_stated_order():
    fields = fields_of(6, 12, 60.0, 0.1, SHOWN)
    assert [field.name for field, _ in fields] == ["rate", "elapsed", "time", "loss", "method", "best", "note"]
    left_out, before = [], {field.name for field, _ in fields} | {DRAWN_BAR.name}
    for room in range(200, 0, -1):
        drawn, texts = fitting(fields, room)
        assert drawn + bool(drawn) + sum(2 + len(text) for text in texts) <= room
        assert drawn <= LONGEST
        names = {field.name for field, text in fields if text in texts} | ({DRAWN_BAR.name} if drawn else set())
        gone = sorted(before - names, key=lambda name: {f.name: f.kept for f in (*FIELDS, DRAWN_BAR)}[name])
        left_out += gone
        before = names
    assert left_out == ["elapsed", "rate", "note", "bar", "loss", "time", "best", "method"]


def test_the_drawn_bar_shrinks_before_a_field_is_left_out():
    fields = fields_of(6, 12, 60.0, 0.1, SHOWN)
    full = 1 + LONGEST + sum(2 + len(text) for _, text in fields)
    assert fitting(fields, full) == (LONGEST, [text for _, text in fields])
    assert fitting(fields, full - 5) == (LONGEST - 5, [text for _, text in fields])


def test_a_finished_bar_has_its_duration_and_nothing_left():
    texts = [text for _, text in fields_of(12, 12, 95.0, 0.126, {})]
    assert texts == ["7.9 s each", "1 min 35 s"]


def test_ranks_of_fields_differ():
    assert len({field.kept for field in (*FIELDS, DRAWN_BAR)}) == len(FIELDS) + 1
