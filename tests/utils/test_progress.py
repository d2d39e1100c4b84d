import io

import pytest
from rich.console import Console
from rich.text import Text

from irdscale.utils import progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=True, width=120, _environ={}))
    return stream


def test_nothing_is_printed_when_not_enabled(capsys, terminal):
    with progress.bar("work", 3, enabled=False) as advance:
        advance()
        advance(2, note="loss 0.1")
    assert capsys.readouterr() == ("", "")
    assert terminal.getvalue() == ""


def test_plain_lines_every_ten_seconds_and_at_the_end(capsys, clock):
    with progress.bar("train", 40) as advance:
        for _ in range(40):
            clock.now += 1
            advance(note="loss 0.5")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train: 10/40 (25 %), 1.0/s, 30 s left, loss 0.5",
        "train: 20/40 (50 %), 1.0/s, 20 s left, loss 0.5",
        "train: 30/40 (75 %), 1.0/s, 10 s left, loss 0.5",
        "train: 40/40 (100 %), 1.0/s, 40 s, loss 0.5",
    ]


def test_plain_quick_work_prints_one_line(capsys, clock):
    with progress.bar("fisher", 2) as advance:
        clock.now += 0.5
        advance(2)
    assert capsys.readouterr().err == "fisher: 2/2 (100 %), 4.0/s, 0.50 s\n"


def test_plain_nested_bars_share_the_ten_seconds(capsys, clock):
    with progress.bar("search", 3) as outer:
        for _ in range(3):
            with progress.bar("train", 4) as inner:
                for _ in range(4):
                    clock.now += 1
                    inner()
            outer()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["train: 2/4 (50 %)", "search: 3/3 (100 %)"]


def test_plain_lines_of_inner_bars_do_not_silence_the_outer_one(capsys, clock):
    with progress.bar("search", 3) as outer:
        for _ in range(3):
            with progress.bar("train", 11) as inner:
                for _ in range(11):
                    clock.now += 1
                    inner(loss=0.5)
            outer()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines if line.startswith("search")] == [f"search: {n}/3" for n in (1, 2, 3)]
    assert sum(line.startswith("train") for line in lines) == 3


@pytest.mark.parametrize("live", [True, False])
def test_a_bar_that_is_over_has_no_time_left_although_its_total_was_too_large(capsys, clock, request, live):
    stream = request.getfixturevalue("terminal") if live else None
    with progress.bar("Evaluations", 12) as advance:
        for _ in range(10):
            clock.now += 1
            advance()
    last = (stream.getvalue() if stream else capsys.readouterr().err).rsplit("10/12")[-1]
    assert "each" in last or "/s" in last
    assert "left" not in last


def test_unknown_total_shows_what_is_done(capsys, clock):
    with progress.bar("read", None) as advance:
        clock.now += 4
        advance(2)
    assert capsys.readouterr().err == "read: 2, 2.0 s each, 4.0 s\n"


def test_a_failure_in_the_body_passes_through_and_leaves_no_bar_open(capsys, terminal):
    with pytest.raises(RuntimeError, match="boom"), progress.bar("outer", 2), progress.bar("inner", 2):
        raise RuntimeError("boom")
    assert progress._State.live is None
    assert progress._State.depth == 0


def test_live_bars_nest_and_the_inner_one_disappears(terminal):
    with progress.bar("search", 2) as outer:
        with progress.bar("train [fast]", 5) as inner:
            inner(5, note="loss 0.25")
            progress._State.live.refresh()
            shown = terminal.getvalue()
            assert "train [fast]" in shown
            assert "5/5" in shown
            assert "loss 0.25" in shown
        outer(note="best 0.9")
        assert [task.description for task in progress._State.live.tasks] == ["search"]
        terminal.truncate(0)
    final = terminal.getvalue()
    assert "1/2" in final
    assert "best 0.9" in final
    assert "train" not in final


def test_a_field_stays_until_it_is_replaced(terminal):
    with progress.bar("search", 3) as advance:
        advance(best=0.9, method="ird", note="seed 0")
        advance()
        progress._State.live.refresh()
        shown = terminal.getvalue().splitlines()[-1]
        assert "ird  best 0.9000" in shown
        assert "seed 0" not in shown
        advance(best=None)
        terminal.truncate(0)
    assert "best" not in terminal.getvalue()


def test_nothing_stays_below_bars_that_are_over(terminal):
    with progress.bar("search", 1) as advance:
        progress.show_below(Text("a table of jobs"))
        progress._State.live.refresh()
        assert "a table of jobs" in terminal.getvalue()
        terminal.truncate(0)
        terminal.seek(0)
        advance()
        # Another thread shows it again while the bar ends.
        stop = progress._State.live.stop
        progress._State.live.stop = lambda: (progress.show_below(Text("a table of jobs")), stop())
    final = terminal.getvalue()
    assert "1/1" in final
    assert "a table of jobs" not in final.rsplit("1/1")[-1]


def test_say_keeps_brackets_and_goes_to_stderr(capsys):
    progress.say("skipped [bold]x[/bold] " + "y" * 200)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "skipped [bold]x[/bold] " + "y" * 200 + "\n"


def test_what_an_earlier_run_did_is_no_part_of_the_rate(capsys, clock, terminal):
    with progress.bar("train", 100) as advance:
        progress._State.live.get_time = clock
        advance(1)
        advance(90, earlier=True)
        clock.now += 5
        advance()
        (task,) = progress._State.live.tasks
        assert (task.completed, task.speed) == (92, 0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "console", Console(stderr=True))
        with progress.bar("train", 100) as advance:
            advance(90, earlier=True)
            clock.now += 10
            advance(5)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "train: 95/100 (95 %), 2.0 s each, 10 s left"
    assert last == "train: 95/100 (95 %), 2.0 s each, 10 s"
