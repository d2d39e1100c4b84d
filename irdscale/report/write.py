"""What a report's templates are filled with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irdscale.config import LANGUAGE_KINDS
from irdscale.report.facts import gather
from irdscale.report.figures import draw_all
from irdscale.report.pages import write_pages
from irdscale.report.verdict import verdict

CAPTIONS = {
    "metric": "Metric against trainable parameters. Grey dots are single seeds; {better} is better.",
    "path": "The way through the rounds. Each square is a pair that was evaluated; orange is the path and the winner.",
    "density": "Where the winner's entries lie: per cent of each module's weights and biases, by layer.",
    "traces": "Fisher trace of every sample of the pool, the largest first, and the ones that chose the winner's mask.",
    "cost": "Seconds by phase.",
}


def write_files(output: Path) -> dict[str, Any]:
    """See `irdscale.report.write_report`."""
    facts = gather(output)
    task = facts.result["task"]
    better = "smaller" if task.get("lower_is_better") else "larger"
    values = {
        "facts": facts,
        "result": facts.result,
        "verdict": verdict(facts.result),
        "captions": {name: caption.format(better=better) for name, caption in CAPTIONS.items()},
        "auto": "AutoModelForCausalLM" if task["kind"] in LANGUAGE_KINDS else "AutoModelForSequenceClassification",
        "output": str(output),
        "seeds": facts.result["config"]["search"]["seeds"],
    }
    return write_pages(output, "irdscale.report", "report", values, draw_all(facts))
