"""Terminal output of a plan."""

from __future__ import annotations

from typing import Any

ITEMS = ("weights", "activations", "fisher", "values_and_moments", "buffers", "total")
PHASES = {"traces": "rank samples", "fisher": "make masks", "begin": "start", "train": "train", "evaluate": "evaluate"}


def print_plan(result: dict[str, Any]) -> None:
    """Print the memory of every phase, the layouts, the time and the advice."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    gpus = result["nodes"] * result["gpus_per_node"]
    console.print(
        f"{result['parameters']:,} parameters, masks of {result['k']:,}; {gpus} x {result['gpu']} on {result['nodes']} "
        f"node(s), {result['stage']}",
        highlight=False,
        soft_wrap=True,
    )
    memory = Table(title=f"GiB per rank, of {result['room_gib']}", title_justify="left")
    for column in ("phase", *(item.replace("_", " ") for item in ITEMS)):
        memory.add_column(column, justify="left" if column == "phase" else "right")
    for phase, name in PHASES.items():
        if phase in result["phases"]:
            held = result["phases"][phase]
            style = "bold" if phase == result["phase"] else None
            memory.add_row(name, *(f"{held[item]:.2f}" for item in ITEMS), style=style)
    console.print(memory)
    if len(result["layouts"]) > 1:
        layouts = Table(title="Layouts: peak GiB per rank, hours of a search", title_justify="left")
        for column in ("stage", "fisher sums", "fisher", "train", "hours", "fits"):
            layouts.add_column(column, justify="right" if column in ("fisher", "train", "hours") else "left")
        for layout in result["layouts"]:
            taken = layout["memory_gib"]
            passes = max(taken["fisher"], taken.get("traces", 0.0))
            training = max(taken["train"], taken["evaluate"], taken.get("begin", 0.0))
            cells = [layout["stage"], layout["fisher"], f"{passes:.1f}", f"{training:.1f}"]
            cells += [f"{layout['search_hours']:.3g}", "yes" if layout["fits"] else "no"]
            layouts.add_row(*cells, style="bold" if layout["configured"] else None)
        console.print(layouts)
    console.print(_work(result), highlight=False, soft_wrap=True)
    for line in result["advice"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _work(result: dict[str, Any]) -> str:
    hours, sent, rate = (result[key] for key in ("hours", "traffic_gib", "samples_per_second"))
    flops = result["flops"]["search"]
    parts = [
        f"Fisher passes {hours['fisher']:.3g} h ({rate['fisher']:.3g} samples/s)",
        f"one candidate {hours['candidate']:.3g} h ({rate['train']:.3g} samples/s)",
        f"the search at most {hours['search']:.3g} h ({result['evaluations']} trainings, {flops:.3g} operations)",
    ]
    traffic = (
        f"{sent['gradients_a_step']:.3g} GiB of gradients and {sent['weights_a_step']:.3g} GiB of weights per step"
    )
    rates = result["rates"]
    rest = (
        f"measured on {rates['device']}" if rates["own"] else f"of {rates['device']}, not measured on {result['gpu']}"
    )
    return (
        f"{', '.join(parts)}, without evaluation; by shares of the peak {rest}. "
        f"A rank sends {sent['sums_a_pass']:.3g} GiB of sums per Fisher pass, and {traffic}."
    )
