"""The table of a comparison, for terminal and report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from irdscale.compare.claims import p_in_words
from irdscale.compare.grid import edge_of
from irdscale.compare.verdict import reference_of
from irdscale.utils.formats import count, number

# Measured cost -> head of its column, and its text.
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "adapter_bytes": ("adapter, bytes", count),
    "seconds": ("seconds a training", lambda value: number(value, 3)),
    "peak_bytes": ("peak GPU memory, GiB", lambda value: f"{value / 2**30:.2f}"),
}


def columns(study: dict[str, Any]) -> list[str]:
    """The column heads."""
    return [
        "method",
        "seeds",
        "test",
        "95 % interval",
        f"{reference_of(study)['label']} minus it",
        "95 % interval",
        "wins, losses, ties",
        "p",
        "selection",
        "learning rate",
        "trained parameters",
        "trainings",
        "cost",
        *(head for name, (head, _) in COSTS.items() if _is_known(study, name)),
        *(["error of the test set"] if _has_errors(study) else []),
    ]


def rows(study: dict[str, Any]) -> list[list[str]]:
    """The cells of every method's row."""
    errors, known = _has_errors(study), [name for name in COSTS if _is_known(study, name)]
    return [
        [
            *_row(method),
            *(_cost(study, method, name) for name in known),
            *([_error(method)] if errors else []),
        ]
        for method in study["methods"]
    ]


def _is_known(study: dict[str, Any], name: str) -> bool:
    """Whether a cost of some method was measured; earlier versions of compare.json have none."""
    return any(costs[name] is not None for costs in study.get("costs", {}).values())


def _cost(study: dict[str, Any], method: dict[str, Any], name: str) -> str:
    value = study["costs"].get(method["name"], {}).get(name)
    return "-" if value is None else COSTS[name][1](value)


def _has_errors(study: dict[str, Any]) -> bool:
    return any(method["test_error"] is not None for method in study["methods"])


def _error(method: dict[str, Any]) -> str:
    return "-" if method["test_error"] is None else f"{method['test_error']:.4f}"


def _row(method: dict[str, Any]) -> list[str]:
    test, difference, rate = method["test"], method["difference"], method["learning_rate"]
    apart = ["", "", "", ""]
    if difference is not None and difference["mean"] is not None:
        apart = [
            f"{difference['mean']:+.4f}",
            _limits(difference, "+.4f"),
            f"{difference['wins']}-{difference['losses']}-{difference['ties']}",
            p_in_words(difference["p"]),
        ]
    return [
        method["label"],
        str(test["n"]),
        _or_failed(test["mean"]),
        _limits(test, ".4f"),
        *apart,
        _or_failed(method["selection"]["mean"]),
        "-" if rate is None else f"{rate:g}" + (f" ({edge})" if (edge := edge_of(method)) else ""),
        "-" if method["params"] is None else count(method["params"]),
        "-" if method["evaluations"] is None else number(method["evaluations"], 3),
        "-" if method["fine_tunings"] is None else number(method["fine_tunings"], 3),
    ]


def _or_failed(mean: float | None) -> str:
    return "failed" if mean is None else f"{mean:.4f}"


def _limits(found: dict[str, Any], form: str) -> str:
    return "-" if found["low"] is None else f"{found['low']:{form}} to {found['high']:{form}}"
