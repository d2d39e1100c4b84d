"""The text of a proposed configuration: YAML with a comment for each value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from irdscale.cli.init_values import Values
from irdscale.config.schema import RunConfig
from irdscale.tasks.first_look import as_flow

# Column of the comments, and longest line.
COMMENTS, WIDTH = 44, 120
_ORDER = {
    "model": ("path", "dtype"),
    "task": ("dataset", "kind", "delimiter", "columns", "chat_template", "max_length", "truncate", "limit"),
    "train": ("epochs", "steps", "batch_size", "gradient_accumulation", "eval_batch_size", "learning_rate"),
}


def yaml_of(values: Values, title: str, metrics: Iterable[str]) -> str:
    """The configuration as YAML.

    Args:
        title: purpose of the configuration, in a line.
        metrics: metrics that fit the task, the default first.
    """
    first, *others = metrics
    lines = [
        f"# What:   {title}",
        "# Needs:  what irdscale doctor my.yaml says of this machine, and irdscale plan my.yaml gpu=NAME of others.",
        "# Launch: irdscale search my.yaml",
        "# Keys:   irdscale help KEY; for editors: irdscale schema > irdscale.schema.json",
    ]
    for section in RunConfig.model_fields:
        keys = [key.partition(".")[2] for key in values if key.startswith(f"{section}.")]
        if section in values:
            lines += _line(section, *values[section], indent="")
        if keys:
            lines.append(f"{section}:")
            order = _ORDER.get(section, ())
            keys.sort(key=lambda key, order=order: order.index(key) if key in order else len(order))  # type: ignore[misc]
            for key in keys:
                lines += _line(key, *values[f"{section}.{key}"], indent="  ")
        if section == "task" and "task.metric" not in values and "task.kind" in values:
            lines += [f"  # metric: {first}".ljust(COMMENTS) + f"# or {', '.join(others)}"]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, comment: str, indent: str) -> Iterator[str]:
    text = f"{indent}{key}:" + ("" if value is None else f" {_scalar(value)}")
    if not comment:
        yield text
    elif max(len(text), COMMENTS - 2) + len(comment) + 4 <= WIDTH:
        yield f"{text.ljust(COMMENTS - 2)}  # {comment}"
    else:
        yield f"{indent}# {comment}"
        yield text


def _scalar(value: Any) -> str:
    if isinstance(value, float) and 0 < value < 0.01:
        mantissa, _, exponent = f"{value:.4e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return as_flow(value).removesuffix("...").strip()
