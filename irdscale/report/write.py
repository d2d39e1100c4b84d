"""What a report's templates are filled with."""

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
    """A label, length, loss or trace; a dash where it is not known."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
