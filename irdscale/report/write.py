"""Fill the templates of a search's report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from irdscale.report.commands import use_commands, use_python
from irdscale.report.facts import finished, gather
from irdscale.report.figures import draw_all
from irdscale.report.heat_maps import equal_density
from irdscale.report.next_steps import next_steps
from irdscale.report.pages import write_pages
from irdscale.report.relations import by_chance
from irdscale.report.sample_texts import class_name, label_word, with_texts
from irdscale.report.terms import RELATIONS, of_search
from irdscale.report.verdict import verdict
from irdscale.utils.formats import duration, percent

CAPTIONS = {
    "metric": "Metric against trainable parameters; {better} is better. Candidates of one size are beside each other, "
    "most samples first; dots are their seeds. Slanted marks are breaks of the axis.",
    "path": "Path of the search. Each cell is an evaluated candidate, darker if it is better; the path and the winner "
    "are orange.",
    "density": "Share of each module's parameters in the winner's mask, in per cent, by layer.",
    "traces": "Fisher traces of the pool's samples, largest first; blue: samples of the winner's mask.",
    "overlap": "Shared entries of the masks of two sample sets, in per cent. Random masks share {chance}.",
}
# Part of a search's seconds -> its name.
PARTS = {
    "fisher": "Fisher passes and masks",
    "train": "candidates",
    "baseline": "baselines",
    "test": "test split",
    "total": "in total",
}
# With more seeds, tables have no column for each.
MOST_SEEDS = 8


def write_files(output: Path, samples: bool, progress: bool) -> dict[str, Any]:
    """See `irdscale.report.write_report`."""
    if samples:
        from irdscale.search.drivers import write_drivers

        write_drivers(output, finished(output), progress)
    facts = gather(output)
    task = facts.result["task"]
    better = "smaller" if task["lower_is_better"] else "larger"
    seeds, spent = facts.result["config"]["search"]["seeds"], facts.result["seconds"]
    advice, commands = next_steps(facts.result, output)
    chance = percent(facts.analysis.overlap.chance) if facts.analysis.overlap else ""
    values = {
        "facts": facts,
        "result": facts.result,
        "verdict": [*verdict(facts.result), *(f"Warning: {text}" for text in facts.result["warnings"])],
        "captions": {name: caption.format(better=better, chance=chance) for name, caption in CAPTIONS.items()},
        "terms": of_search(facts.result, len(facts.traces)),
        "measures": [RELATIONS[name] for name in dict.fromkeys(r.measure for r in facts.analysis.relations)],
        "next": advice,
        "next_commands": commands,
        "commands": use_commands(facts.result, output),
        "python": use_python(facts.result, output),
        "equal_density": equal_density(facts),
        "top": with_texts(facts.analysis.top, facts.texts),
        "lowest": with_texts(facts.analysis.lowest, facts.texts),
        "drivers": with_texts(facts.analysis.drivers.top if facts.analysis.drivers else [], facts.texts),
        "label": label_word(task["kind"]),
        "times": ", ".join(f"{duration(spent[name])} {words}" for name, words in PARTS.items() if spent.get(name)),
        "seeds": seeds if len(seeds) <= MOST_SEEDS else [],
    }
    filters: dict[str, Callable[[Any], Any]] = {
        "chance": by_chance,
        "class_name": partial(class_name, facts.texts.label_names),
    }
    return write_pages(output, "irdscale.report", "report", values, draw_all(facts), filters)
