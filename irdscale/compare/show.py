"""Terminal output of a finished comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irdscale.compare.claims import COLUMNS, claim_rows, claims_of, how_to_read
from irdscale.compare.missing import missing_notes, print_missing, progress_lines
from irdscale.compare.next_steps import widening
from irdscale.compare.table import columns, rows
from irdscale.compare.verdict import cost_and_gain, failures, notes
from irdscale.utils.formats import counted, duration
from irdscale.utils.terminal import Column, Table, print_line, print_table

# Places of the columns that a narrow terminal leaves out, the first one first: seeds, selection, measured costs and
# error of the test set, p, trainings, the interval of the test metric, learning rate, cost, parameters. In 80
# characters there is room for method, test, difference, its interval and wins.
_LEFT_OUT = (1, 8, 16, 15, 14, 13, 7, 11, 3, 9, 12, 10)


# Places of the columns of claims that a narrow terminal leaves out, the first one first: trainings, uncorrected p.
_CLAIMS_LEFT_OUT = (6, 4)


def print_comparison(result: dict[str, Any], output: Path) -> None:
    """Print the claims, the methods with their differences to the reference, notes, and the path of the report."""
    from rich.console import Console
    from rich.text import Text

    if not result["seeds"]:
        print_missing(result)
        return
    task, console = result["task"], Console()
    claims = claims_of(result)
    if claims:
        of_claims = _heads(COLUMNS, (0, len(COLUMNS) - 1), _CLAIMS_LEFT_OUT)
        print_table(console, Table(of_claims, claim_rows(claims), "What the seeds show"))
        print_line(console, how_to_read(result, claims))
        print_line(console)
    heads = _heads(columns(result), (0,), _LEFT_OUT)
    styles = ["bold" if method["name"] == result["reference"] else None for method in result["methods"]]
    title = f"{task['name']}: {task['metric']} on the test split, {counted(len(result['seeds']), 'seed')}"
    print_table(console, Table(heads, rows(result), title, styles))
    wider = widening(result, output)
    # A command is not wrapped, so that it can be copied.
    more: list[str | Text] = ["More learning rates, with the trainings so far:", Text(wider)] if wider else []
    lines: list[str | Text] = [
        "",
        cost_and_gain(result),
        "",
        *missing_notes(result),
        *notes(result),
        *more,
        *(f"Failed: {line}" for line in failures(result)),
        "",
        f"{counted(result['evaluations'], 'training')} in {duration(result['seconds']['total'])}.",
        f"Report: {output.absolute() / 'compare.html'}",
        *progress_lines(result),
    ]
    for line in lines:
        print_line(console, line)


def _heads(names: Sequence[str], texts: Sequence[int], left_out: Sequence[int]) -> list[Column]:
    """The columns of a table, by the places of those with text and of those to leave out, the first one first."""
    drops = {place: len(left_out) - number for number, place in enumerate(left_out)}
    return [
        Column(name, text=place in texts, wraps=place in texts, drop=drops.get(place, 0))
        for place, name in enumerate(names)
    ]
