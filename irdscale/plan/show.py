"""Terminal output of a plan."""

from __future__ import annotations

from typing import Any

from irdscale.utils.formats import count, counted, duration, gib, operations, speed
from irdscale.utils.terminal import Column, Table, print_line, print_table

ITEMS = ("weights", "activations", "fisher", "values_and_moments", "buffers", "total")
PHASES = {"traces": "rank samples", "fisher": "make masks", "begin": "start", "train": "train", "evaluate": "evaluate"}


def print_plan(result: dict[str, Any]) -> None:
    """Print whether it fits, the time, the memory of every phase, the layouts and the advice."""
    from rich.console import Console

    console = Console()
    gpus = result["nodes"] * result["gpus_per_node"]
    about, *advice = result["advice"]
    lines = [
        f"A model of {count(result['parameters'])} parameters, masks of {count(result['k'])} entries; "
        f"{gpus} x {result['gpu']} on {counted(result['nodes'], 'node')}, {result['stage']}.",
        about,
        *_work(result),
        *advice,
    ]
    for line in lines:
        print_line(console, line)
    print_line(console)
    print_table(console, _memory(result))
    if len(result["layouts"]) > 1:
        print_line(console)
        print_table(console, _layouts(result))


def _memory(result: dict[str, Any]) -> Table:
    columns = [Column("phase", text=True), *(Column(item.replace("_", " ")) for item in ITEMS)]
    shown = [phase for phase in PHASES if phase in result["phases"]]
    rows = [[PHASES[phase], *(f"{result['phases'][phase][item]:.2f}" for item in ITEMS)] for phase in shown]
    styles = ["bold" if phase == result["phase"] else None for phase in shown]
    return Table(columns, rows, f"GiB per rank, of {result['room_gib']:,.1f} GiB", styles)


def _layouts(result: dict[str, Any]) -> Table:
    columns = [Column("stage", text=True), Column("Fisher sums", text=True), Column("Fisher pass"), Column("training")]
    columns += [Column("search"), Column("fits", text=True)]
    rows = []
    for layout in result["layouts"]:
        taken = layout["memory_gib"]
        passes = max(taken["fisher"], taken.get("traces", 0.0))
        training = max(taken["train"], taken["evaluate"], taken.get("begin", 0.0))
        cells = [layout["stage"], layout["fisher"], f"{passes:,.2f}", f"{training:,.2f}"]
        rows.append([*cells, duration(3600 * layout["search_hours"]), "yes" if layout["fits"] else "no"])
    styles = ["bold" if layout["configured"] else None for layout in result["layouts"]]
    return Table(columns, rows, "Layouts: peak GiB per rank, and time of a search", styles)


def _work(result: dict[str, Any]) -> list[str]:
    hours, sent, rate = (result[key] for key in ("hours", "traffic_gib", "samples_per_second"))
    times = {name: duration(3600 * value) for name, value in hours.items()}
    rates = result["rates"]
    rest = (
        f"measured on {rates['device']}" if rates["own"] else f"of {rates['device']}, not measured on {result['gpu']}"
    )
    passes, candidate = (
        f"{times[name]} ({_samples(rate[of])})" for name, of in (("fisher", "fisher"), ("candidate", "train"))
    )
    lines = [
        f"Time: the search at most {times['search']} ({counted(result['evaluations'], 'training')}, "
        f"{operations(result['flops']['search'])}); the Fisher passes {passes}, one "
        f"candidate {candidate}. Without evaluation; by shares of the peak {rest}."
    ]
    if any(sent.values()):
        lines.append(
            f"Traffic: a rank sends {gib(sent['sums_a_pass'])} of sums per Fisher pass, and per step "
            f"{gib(sent['gradients_a_step'])} of gradients and {gib(sent['weights_a_step'])} of weights."
        )
    return lines


def _samples(per_second: float) -> str:
    """`4.3 samples/s`, or `1.5 s each` if that number is larger."""
    return speed(per_second).replace("/s", " samples/s").replace(" each", " a sample")
