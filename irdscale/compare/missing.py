"""What a comparison's result says of its missing seeds, for terminal and report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from irdscale.utils.formats import counted
from irdscale.utils.terminal import print_line


def missing_notes(study: dict[str, Any]) -> list[str]:
    """What a comparison's result says of its missing seeds; empty if it is finished."""
    missing = study.get("missing")
    if not missing:
        return []
    lines = []
    if study["seeds"]:
        lines.append(
            f"Not finished: this is what {_seeds(study['seeds'])} found, complete for all methods. The learning rates "
            "are chosen by the mean over these seeds; more seeds may change them, and then searches run again at the "
            "new rate. The test split was read for what these seeds chose; no choice depends on it."
        )
    else:
        lines.append("Not finished: no seed is complete for all methods, so there is no report yet.")
    for one in missing["seeds"]:
        labels = [
            f"{method['label']} ({method['done']} of at most {method['most']} evaluations)"
            if method["done"]
            else method["label"]
            for method in one["methods"]
        ]
        lines.append(f"Missing for seed {one['seed']}: {', '.join(labels) or 'test metrics'}.")
    if missing["next"]:
        lines.append(f"The time was too short for the next one: {missing['next']}.")
    return lines


def progress_lines(study: dict[str, Any]) -> list[str]:
    """One line on the evaluations that are done; none if the comparison is finished."""
    missing = study.get("missing")
    if not missing:
        return []
    most = "" if missing["exact"] else "at most "
    return [f"{missing['done']:,} of {most}{counted(missing['of'], 'evaluation')} are done; the same command goes on"]


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"


def print_missing(study: dict[str, Any]) -> None:
    """Print what is missing of a comparison without a complete seed."""
    from rich.console import Console

    console = Console()
    for line in (*missing_notes(study), *progress_lines(study)):
        print_line(console, line)
