"""Fill the templates and write the files."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from irdscale.config import LANGUAGE_KINDS
from irdscale.files import write_atomic
from irdscale.progress import duration
from irdscale.report.analysis import Relation
from irdscale.report.facts import finished, gather
from irdscale.report.figures import draw_all
from irdscale.report.verdict import percent, verdict

CAPTIONS = {
    "metric": "Metric against trainable parameters. Grey dots are single seeds; {better} is better.",
    "path": "The way through the rounds. Each square is a pair that was evaluated; orange is the path and the winner.",
    "density": "Where the winner's entries lie: per cent of each module's weights and biases, by layer.",
    "traces": "Fisher trace of every sample of the pool, the largest first, and the ones that chose the winner's mask.",
    "overlap": "Entries that the masks of two sample sets have in common, in per cent; random masks: {chance}.",
    "drift": "What each layer gains and loses of the mask's entries as samples are dropped; orange: the smallest set.",
    "cost": "Seconds by phase.",
}


def write_files(output: Path, samples: bool, progress: bool) -> dict[str, Any]:
    """See `irdscale.report.write_report`."""
    if samples:
        from irdscale.search.drivers import write_drivers

        write_drivers(output, finished(output), progress)
    facts = gather(output)
    figures = draw_all(facts)
    environment = Environment(
        loader=PackageLoader("irdscale.report", "."),
        autoescape=lambda name: bool(name and "html" in name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": _score, "percent": percent, "duration": duration, "cell": _markdown_cell}
    environment.filters |= {"number": _number, "chance": _chance}
    task = facts.result["task"]
    better = "smaller" if task.get("lower_is_better") else "larger"
    chance = percent(facts.analysis.overlap.chance) if facts.analysis.overlap else ""
    values = {
        "facts": facts,
        "result": facts.result,
        "verdict": verdict(facts.result),
        "captions": {name: caption.format(better=better, chance=chance) for name, caption in CAPTIONS.items()},
        "auto": "AutoModelForCausalLM" if task["kind"] in LANGUAGE_KINDS else "AutoModelForSequenceClassification",
        "output": str(output),
        "seeds": facts.result["config"]["search"]["seeds"],
        "figures": {name: base64.b64encode(data).decode() for name, data in figures.items()},
    }
    for name, data in figures.items():
        write_atomic(output / "figures" / f"{name}.png", data)
    for name in ("report.md", "report.html"):
        write_atomic(output / name, environment.get_template(f"{name}.jinja").render(values))
    return {
        "markdown": str(output / "report.md"),
        "html": str(output / "report.html"),
        "figures": [str(output / "figures" / f"{name}.png") for name in figures],
    }


def _score(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4f}"


def _number(value: object) -> str:
    """A label, length, loss or trace; a dash where it is not known."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _chance(relation: Relation) -> str:
    """Where 95 % of the values of an unrelated property lie."""
    low, high = relation.chance
    if relation.measure == "Spearman":
        return f"±{high:.2f}"
    return f"below {high:.2f}" if relation.measure == "eta squared" else f"{low:.2f} to {high:.2f}"


def _markdown_cell(value: object) -> str:
    """Text that cannot leave its table cell or turn into markup."""
    text = " ".join(str(value).split())
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return text
