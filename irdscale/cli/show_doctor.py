"""Print what `doctor` found: the answer first, then how long the search takes, and the versions last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from irdscale.utils.formats import counted, duration, gib
from irdscale.utils.terminal import print_line

TYPES = ("float32", "float64", "bfloat16")


def print_doctor(result: dict[str, Any]) -> None:
    """Print whether a search can run here and why not, its time, the machine, and the versions."""
    from rich.console import Console

    console = Console()
    can = "can" if result["ok"] else "cannot"
    print_line(console, f"irdscale search {can} run here.", "bold")
    for problem in result["problems"]:
        colour = "red" if problem["blocks_search"] else "yellow"
        print_line(console, f"Cannot {problem['cannot']}: {problem['why']}", colour)
    for text in search_lines(result["search"]):
        print_line(console, text)
    for title, lines in (("Machine", _machine(result)), ("Versions", _versions(result))):
        print_line(console)
        print_line(console, title, "bold")
        for text, style in lines:
            print_line(console, f"  {text}", style)


def search_lines(search: dict[str, Any] | None) -> Iterator[str]:
    """Lines about the estimated time of a search."""
    if search is None:
        return
    most = search["at_most"]
    for runner in ("local", "ray"):
        if search[runner] is not None:
            found, costs = search[runner], search[runner]["costs"]
            side = "one evaluation after the other" if runner == "local" else f"{found['at_once']} evaluations at once"
            yield (
                f"With search.runner={runner} it takes at most about {duration(found['seconds'])}: {side}, "
                f"{duration(costs['step'])} a step, {duration(costs['gradient'])} a sample gradient."
            )
    yield (
        f"It runs at most {counted(most['evaluations'], 'evaluation')} of {counted(most['steps'], 'step')}, "
        f"over {counted(most['rounds'], 'round')}."
    )
    if search["ray"] is not None and search["ray"].get("sharing"):
        yield search["ray"]["sharing"]["said"]


def _machine(result: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    torch = result.get("torch")
    if "free_memory_gib" in result:
        cpus = "" if torch is None else f"{counted(torch['cpus'], 'CPU')}, {counted(torch['threads'], 'thread')}; "
        yield (
            f"{cpus}{gib(result['free_memory_gib'])} of memory and {gib(result['free_disk_gib'])} of disk are free",
            None,
        )
    for name, device in ({} if torch is None else torch["devices"]).items():
        works = [kind for kind in TYPES if device.get(kind)]
        card = ""
        if "name" in device:
            card = f"{device['name']}, {gib(device['free_memory_gib'])} of {gib(device['memory_gib'])} free; "
        yield f"{name}: {card}{', '.join(works) or 'no type of number'} can be used", None
    for text in cluster_lines(result["ray"]):
        yield text, None
    if "hub" in result:
        yield f"model hub: {result['hub']}", None
    if result.get("minilm"):
        yield f"model of configs/quickstart.yaml: {result['minilm']}", None


def cluster_lines(ray: dict[str, Any]) -> Iterator[str]:
    """Lines about the Ray cluster, if one was found."""
    if ray["version"] is None:
        return
    found = ray["cluster"]
    if found is None:
        yield "No Ray cluster runs here; a search with search.runner=ray starts one on this machine."
        return
    has = (
        f"{counted(found['nodes'], 'node')}, {counted(found['cpus'], 'CPU')}, {counted(found['gpus'], 'GPU')}, "
        f"{gib(found['memory_gib'])}"
    )
    where = "of this machine" if found.get("started_here") else f"at {found['address']}"
    yield f"Ray cluster {where}: {has}"


def _versions(result: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Packages that a search needs and does not find, then all others."""
    for name, package in result["packages"].items():
        if not package["ok"]:
            yield f"{name} {package['found'] or 'missing'} (needs {package['needs'] or 'any version'})", "red"
    found = [f"{name} {result[name]}" for name in ("python", "platform") if name in result]
    found += [
        f"{name} {package['found']} (needs {package['needs'] or 'any version'})"
        for name, package in result["packages"].items()
        if package["ok"]
    ]
    versions = {name: result.get(name) for name in ("bitsandbytes", "deepspeed")} | {"ray": result["ray"]["version"]}
    found += [f"{name} {version or 'missing'}" for name, version in versions.items()]
    for text in found:
        yield text, None
