"""The learning rates of a comparison: how they were chosen, and a wider grid where one is at its edge."""

from __future__ import annotations

import json
from typing import Any


def rates_in_words(study: dict[str, Any]) -> str:
    """How the learning rates were chosen."""
    rates, count = ", ".join(f"{rate:g}" for rate in study["learning_rates"]), len(study["methods"][0]["grid"])
    if isinstance(study["config"]["compare"]["learning_rates"], dict):
        own = f"the best mean on the selection split of its own {count}" if count > 1 else "its own"
        rates = ", ".join(f"{rate:g}" for rate in sorted(study["learning_rates"]))
        return f"Learning rate of each method: {own}; all are {rates}."
    if len(study["learning_rates"]) > 1:
        return f"Learning rate of each method: the best mean on the selection split of {rates}."
    return f"One learning rate for all methods: {rates}."


def edge_of(method: dict[str, Any]) -> str | None:
    """`smallest` or `largest` if a method's learning rate is at that edge of its grid; None if it is inside."""
    rates = {point["learning_rate"] for point in method["grid"]}
    if len(rates) < 2 or method["learning_rate"] not in (min(rates), max(rates)):
        return None
    return "smallest" if method["learning_rate"] == min(rates) else "largest"


def edge_notes(study: dict[str, Any]) -> list[str]:
    """A note on each edge of the grid that a method chose."""
    lines = []
    for word in ("smallest", "largest"):
        at_end = [method["label"] for method in study["methods"] if edge_of(method) == word]
        if at_end:
            lines.append(
                f"The {word} learning rate of the grid was chosen for {', '.join(at_end)}: the grid may be too narrow."
            )
    return lines


def wider_grid(study: dict[str, Any]) -> str | None:
    """The change of `compare.learning_rates` with one more rate at each edge that a method chose; None without any."""
    if not any(edge_of(method) for method in study["methods"]):
        return None
    return f"compare.learning_rates={_written(_widened(study))}"


def _widened(study: dict[str, Any]) -> list[float] | dict[str, list[float]]:
    """`compare.learning_rates` with one more rate at each chosen edge; grids of one length stay so."""
    methods, asked = study["methods"], study["config"]["compare"]["learning_rates"]
    if not isinstance(asked, dict):
        return _extended(study["learning_rates"], {edge for method in methods if (edge := edge_of(method))})
    grids = {method["name"]: [point["learning_rate"] for point in method["grid"]] for method in methods}
    return {
        # Where the best rate is inside, one more at the top keeps the grids of one length.
        method["name"]: _extended(grids[method["name"]], {edge_of(method) or "largest"})
        for method in methods
    }


def _extended(rates: list[float], edges: set[str]) -> list[float]:
    """Learning rates in ascending order, with one more at each edge, by a factor of about 3."""
    rates = sorted(rates)
    below = [float(f"{rates[0] / 3:.1g}")] if "smallest" in edges else []
    above = [float(f"{rates[-1] * 3:.1g}")] if "largest" in edges else []
    return [*below, *rates, *above]


def _written(rates: list[float] | dict[str, list[float]]) -> str:
    """Learning rates as YAML in one line."""
    if isinstance(rates, dict):
        return "{" + ",".join(f"{json.dumps(name)}: {_written(own)}" for name, own in rates.items()) + "}"
    return f"[{','.join(f'{rate:g}' for rate in rates)}]"
