"""Fill the templates of a search's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.report.facts import finished, gather
from irdscale.report.figures import draw_all
from irdscale.report.pages import write_pages
from irdscale.report.relations import by_chance
from irdscale.report.verdict import percent, verdict, warnings

CAPTIONS = {
    "metric": "Metric against trainable parameters. Grey dots are single seeds; {better} is better.",
    "path": "Path of the search. Each square is an evaluated pair; the path and the winner are orange.",
    "density": "Share of each module's parameters in the winner's mask, in per cent, by layer.",
    "traces": "Fisher traces of the pool's samples, largest first; blue: samples of the winner's mask.",
    "overlap": "Shared entries of the masks of two sample sets, in per cent; random masks: {chance}.",
    "drift": "Change of each layer's share of the mask as samples are dropped; orange: smallest set.",
    "cost": "Seconds by phase.",
}


def write_files(output: Path, samples: bool, progress: bool) -> dict[str, Any]:
    """See `irdscale.report.write_report`."""
    if samples:
        from irdscale.search.drivers import write_drivers

        write_drivers(output, finished(output), progress)
    facts = gather(output)
    task = facts.result["task"]
    better = "smaller" if task["lower_is_better"] else "larger"
    chance = percent(facts.analysis.overlap.chance) if facts.analysis.overlap else ""
    values = {
        "facts": facts,
        "result": facts.result,
        "verdict": [*verdict(facts.result), *warnings(facts.result)],
        "captions": {name: caption.format(better=better, chance=chance) for name, caption in CAPTIONS.items()},
        "auto": "AutoModelForCausalLM" if task["kind"] in LANGUAGE_KINDS else "AutoModelForSequenceClassification",
        "output": str(output),
        "seeds": facts.result["config"]["search"]["seeds"],
    }
    filters = {"number": _number, "chance": by_chance}
    return write_pages(output, "irdscale.report", "report", values, draw_all(facts), filters)


def _number(value: object) -> str:
    """A label, length, loss or trace; a dash if unknown."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
