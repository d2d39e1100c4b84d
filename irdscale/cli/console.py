"""Print the results of verbs to a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from irdscale.cli.ranks import rank_of_this_process


def show(result: dict[str, Any], as_json: bool, summary: Callable[[], None] | None = None) -> None:
    """Print a verb's result on rank 0: as JSON, by `summary`, or one line per value."""
    if rank_of_this_process()[0] > 0:
        return
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    elif summary is not None:
        summary()
    else:
        from irdscale.config.loader import leaves

        for key, value in leaves({key: value for key, value in result.items() if value != []}):
            print(f"{key:24} {readable(value)}")
    sys.stdout.flush()


def readable(value: Any) -> str:
    """A value as text: `yes`, `1,234`, `0.9877`."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(readable(item) for item in value)
    return str(value)


def print_search(result: dict[str, Any], output: Path) -> None:
    """Print the winner beside its baselines, and the paths of adapter and report."""
    from rich.console import Console
    from rich.table import Table

    from irdscale.report.verdict import with_error
    from irdscale.utils.formats import duration

    task, best, baseline = result["task"], result["best"], result["baseline"]
    table = Table(
        title=f"{task['name']}: {task['metric']}, mean over {len(best['seeds'])} seed(s)", title_justify="left"
    )
    for column in ("", "samples", "parameters", "selection", "test"):
        table.add_column(column, justify="right" if column else "left")
    rows = [("winner", best), ("random samples (FISH)", baseline["fish_random"])]
    rows.append(("head only (linear probe)", baseline.get("linear_probe")))
    rows.append(("the base model", baseline.get("base")))
    for name, entry in rows:
        if entry is not None:
            cells = [entry.get("samples"), entry["params"], entry["metric"]]
            numbers = [f"{cell:.4f}" if isinstance(cell, float) else readable(cell) for cell in cells]
            numbers.append(with_error(entry["test_metric"], entry["test_error"]))
            table.add_row(name, *numbers, style="bold" if entry is best else None)
    console = Console()
    console.print(table)
    share = 100 * best["params"] / result["model"]["parameters"]
    seconds = duration(result["seconds"]["total"])
    lines = [
        f"The winner trains {share:.3g} % of the model's {result['model']['parameters']:,} parameters"
        + (", and the head." if result["model"]["head"] else "."),
        f"Ended: {result['stop']}; {result['evaluations']} evaluations ({result['reused']} reused) in {seconds}.",
        *(f"Warning: {text}" for text in result["warnings"]),
        f"Adapter: {output.absolute() / best['adapter']}",
        f"Report:  {output.absolute() / 'report.html'}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def print_bench(result: dict[str, Any]) -> None:
    """Print every ratio beside its bar, in red where the bar is missed."""
    from rich.console import Console
    from rich.table import Table

    where = f"{result['threads']} thread(s)" + (f" and {result['device']}" if result["device"] else "")
    table = Table(title=f"Ratios on {where}, torch {result['torch']}", title_justify="left")
    for column in ("part", "what", "model", "tokens", "ratio", "quartiles", "bar"):
        table.add_column(column, justify="right" if column in ("tokens", "ratio", "quartiles", "bar") else "left")
    for row in result["rows"]:
        quartiles = f"{row['low']:.2f}-{row['high']:.2f}"
        cells = [row["part"], row["what"], row["model"], str(row["tokens"]), f"{row['ratio']:.2f}", quartiles]
        table.add_row(*cells, row["bar"], style="red" if row["met"] is False else None)
    console = Console()
    console.print(table)
    for problem in result["failed"]:
        console.print(f"Failed: {problem}", style="red", soft_wrap=True, markup=False, highlight=False)


def print_doctor(result: dict[str, Any]) -> None:
    """Print this machine's packages and devices, and what it can run."""
    from rich.console import Console

    from irdscale.config.loader import leaves

    console = Console()

    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)

    apart = ("packages", "problems", "ok", "ray", "search")
    for key, value in leaves({k: v for k, v in result.items() if k not in apart}):
        line(f"{key:24} {readable(value)}")
    for name, package in result["packages"].items():
        found = package["found"] or "missing"
        line(f"{name:24} {found} (needs {package['needs'] or 'any version'})", None if package["ok"] else "red")
    line(f"{'ray':24} {readable(result['ray']['version'])}")
    for text in (*cluster_lines(result["ray"]), *search_lines(result["search"])):
        line(text)
    for problem in result["problems"]:
        line(f"Cannot {problem['cannot']}: {problem['why']}", "red" if problem["blocks_search"] else "yellow")
    line("irdscale search can run here." if result["ok"] else "irdscale search cannot run here.", "bold")


def cluster_lines(ray: dict[str, Any]) -> Iterator[str]:
    """Lines about the Ray cluster, if one was found."""
    if ray["version"] is None:
        return
    found = ray["cluster"]
    if found is None:
        yield "No Ray cluster runs here; a search with search.runner=ray starts one on this machine."
        return
    has = f"{found['nodes']} node(s), {found['cpus']} CPUs, {found['gpus']} GPUs, {found['memory_gib']} GiB"
    yield (
        f"Ray cluster of this machine: {has}"
        if found.get("started_here")
        else f"Ray cluster at {found['address']}: {has}"
    )


def search_lines(search: dict[str, Any] | None) -> Iterator[str]:
    """Lines about the estimated time of a search."""
    from irdscale.utils.formats import duration

    if search is None:
        return
    most = search["at_most"]
    yield (
        f"The search runs at most {most['evaluations']:,} evaluations of {most['steps']:,} steps, "
        f"over {most['rounds']} rounds."
    )
    for runner in ("local", "ray"):
        if search[runner] is not None:
            found, costs = search[runner], search[runner]["costs"]
            side = "one evaluation after the other" if runner == "local" else f"{found['at_once']} evaluations at once"
            yield (
                f"search.runner={runner}: at most about {duration(found['seconds'])}, {side}; "
                f"{costs['step']:.3g} s a step, {costs['gradient']:.3g} s a sample gradient."
            )
            if found.get("sharing"):
                yield found["sharing"]["said"]
