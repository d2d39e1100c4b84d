import io

import pytest
from rich.console import Console

from irdscale.utils.terminal import Column, Table, print_line, print_table, wrapped

TABLE = Table(
    [Column("", text=True, wraps=True), Column("samples"), Column("trained"), Column("95 % interval", drop=1)],
    [["winner", "32", "113,570", "0.51 to 0.55"], ["head only (linear probe)", "-", "0", "-"]],
    title="glue/sst2: accuracy",
)


def test_words_stay_whole():
    text = "  cut: 7 of 200 samples are in /a/path/that/is/longer/than/a/line now"
    assert wrapped(text, 30) == [
        "  cut: 7 of 200 samples are in",
        "  /a/path/that/is/longer/than/a/line",
        "  now",
    ]
    assert wrapped(text, None) == [text]
    assert wrapped("", 10) == [""]
    assert wrapped("it takes 12.5 GiB, or less", 14) == ["it takes", "12.5 GiB, or", "less"]
    # Wide characters take two cells.
    assert wrapped("评 论 好 坏", 5) == ["评 论", "好 坏"]


def test_a_table_fits():
    assert [line for line, _ in TABLE.lines(80)] == [
        "glue/sst2: accuracy",
        "                          samples  trained  95 % interval",
        "winner                         32  113,570   0.51 to 0.55",
        "head only (linear probe)        -        0              -",
    ]
    for width in (80, 52, 40, 30):
        assert all(len(line) <= width for line, _ in TABLE.lines(width))


def test_headings_break_then_columns_are_left_out_then_cells_break():
    shown = {width: [line for line, _ in TABLE.lines(width)][1:] for width in (57, 56, 46, 40)}
    assert len(shown[57]) == 3
    assert "interval" not in "".join(shown[46])
    assert shown[56][0].endswith("95 %")
    assert len(shown[46]) == 3
    assert shown[40][-1] == "probe)"
    assert all("113,570" in "".join(lines) for lines in shown.values())


@pytest.mark.parametrize("terminal", [True, False])
def test_elsewhere_lines_are_plain_and_of_any_length(terminal):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=30, _environ={})
    print_table(console, TABLE)
    print_line(console, "[red]:x:" + "word " * 20, style="bold")
    text = stream.getvalue()
    assert "[red]:x:word" in text
    assert ("\x1b" in text) == terminal
    assert (max(map(len, text.splitlines())) > 99) == (not terminal)
    if not terminal:
        assert all(line == line.rstrip() for line in text.splitlines()[:-1])
