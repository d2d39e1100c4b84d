"""Print the results of verbs to a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from irdscale.cli.ranks import rank_of_this_process
from irdscale.utils.formats import count, counted, duration, number, percent
from irdscale.utils.terminal import Column, Table, print_line, print_table

# Words for keys of results; the other keys stand for themselves.
WORDS = {
    "params": "trained parameters",
    "parameters": "model size",
    "scored": "scored parameters",
    "head": "trained in the head",
    "sample_gradients": "sample gradients",
    "seconds": "time",
}
DURATIONS = ("seconds",)


def show(result: dict[str, Any], as_json: bool, summary: Callable[[], None] | None = None) -> None:
    """Print a verb's result on rank 0: as JSON, by `summary`, or one line per value."""
    if rank_of_this_process()[0] > 0:
        return
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    elif summary is not None:
        summary()
    else:
        _print_leaves(result)
    sys.stdout.flush()


def _print_leaves(result: dict[str, Any]) -> None:
    from rich.console import Console

    from irdscale.config.loader import leaves

    console = Console()
    found = leaves({key: value for key, value in result.items() if value != []})
    lines = [(WORDS.get(key, key), duration(value) if key in DURATIONS else readable(value)) for key, value in found]
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        print_line(console, f"{name:{width}}  {text}")


def print_train(result: dict[str, Any]) -> None:
    """Print a training's result without what the configuration says."""
    _print_leaves({key: value for key, value in result.items() if key not in ("best", "task", "config", "versions")})


def readable(value: Any) -> str:
    """A value as text: `yes`, `1,234`, `0.9877`."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(readable(item) for item in value)
    return str(value)


def print_search(result: dict[str, Any], output: Path) -> None:
    """Print the winner beside its baselines, and the paths of adapter and report."""
    from rich.console import Console

    from irdscale.report.verdict import with_error

    task, best, baseline, model = result["task"], result["best"], result["baseline"], result["model"]
    entries = [("winner", best), ("random samples (FISH)", baseline["fish_random"])]
    entries.append(("head only (linear probe)", baseline.get("linear_probe")))
    entries.append(("the base model", baseline.get("base")))
    rows = [
        [
            name,
            readable(entry.get("samples")),
            count(entry["params"]),
            "-" if entry["metric"] is None else f"{entry['metric']:.4f}",
            with_error(entry["test_metric"], entry["test_error"]),
        ]
        for name, entry in entries
        if entry is not None
    ]
    columns = [Column("", text=True, wraps=True), *map(Column, ("samples", "trained", "selection", "test"))]
    title = f"{task['name']}: {task['metric']}, mean over {counted(len(best['seeds']), 'seed')}"
    console = Console()
    print_table(console, Table(columns, rows, title, ["bold"]))
    lines = [
        "",
        f"The winner trains {percent(best['params'] / model['parameters'])} of the model: {count(best['params'])} of "
        f"{count(model['parameters'])} parameters" + (", and the head." if model["head"] else "."),
        f"Ended: {result['stop']}; {counted(result['evaluations'], 'evaluation')} ({result['reused']} reused) in "
        f"{duration(result['seconds']['total'])}.",
        *(f"Warning: {text}" for text in result["warnings"]),
        f"Adapter: {output.absolute() / best['adapter']}",
        f"Report:  {output.absolute() / 'report.html'}",
    ]
    for line in lines:
        print_line(console, line)


def print_bench(result: dict[str, Any]) -> None:
    """Print every ratio beside its bar, in red where the bar is missed."""
    from rich.console import Console

    where = counted(result["threads"], "thread") + (f" and {result['device']}" if result["device"] else "")
    columns = [
        Column("part", text=True, drop=3),
        Column("what", text=True, wraps=True),
        Column("model", text=True, wraps=True, drop=1),
        Column("tokens", drop=2),
        Column("ratio"),
        Column("quartiles", drop=4),
        Column("bar"),
    ]
    rows = [
        [
            row["part"],
            row["what"],
            row["model"],
            count(row["tokens"]),
            f"{row['ratio']:,.2f}",
            f"{row['low']:,.2f}-{row['high']:,.2f}",
            row["bar"],
        ]
        for row in result["rows"]
    ]
    styles = ["red" if row["met"] is False else None for row in result["rows"]]
    console = Console()
    print_table(console, Table(columns, rows, f"Ratios on {where}, torch {result['torch']}", styles))
    for problem in result["failed"]:
        print_line(console, f"Failed: {problem}", "red")
