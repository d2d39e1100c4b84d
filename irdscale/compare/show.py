"""Terminal output of a finished comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irdscale.compare.table import columns, rows
from irdscale.compare.verdict import cost_and_gain, failures, notes
from irdscale.utils.formats import duration

# Columns that fit in 80 characters: method, test, difference, its interval, wins.
_SHOWN = (0, 2, 4, 5, 6)


def print_comparison(result: dict[str, Any], output: Path) -> None:
    """Print the methods, their differences to the reference, the conclusions and the path of the report."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    task = result["task"]
    table = Table(
        title=Text(f"{task['name']}: {task['metric']} on the test split, {len(result['seeds'])} seed(s)"),
        title_justify="left",
    )
    heads, cells = columns(result), rows(result)
    for place in _SHOWN:
        width = max(map(len, (*heads[place].split(), *(row[place] for row in cells))))
        table.add_column(Text(heads[place]), justify="right" if place else "left", width=width)
    for method, row in zip(result["methods"], cells, strict=True):
        style = "bold" if method["name"] == result["reference"] else None
        table.add_row(*(Text(row[place]) for place in _SHOWN), style=style)
    console = Console()
    console.print(table)
    lines = [
        cost_and_gain(result),
        *notes(result),
        *(f"Failed: {line}" for line in failures(result)),
        f"{result['evaluations']:,} trainings in {duration(result['seconds']['total'])}.",
        f"Report: {output.absolute() / 'compare.html'}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
