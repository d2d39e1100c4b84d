"""The report of a finished comparison, from compare.json and its folder's samples and masks."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from irdscale.compare.claims import COLUMNS as CLAIM_COLUMNS
from irdscale.compare.claims import claim_rows, claims_of, how_to_read
from irdscale.compare.figures import draw_all
from irdscale.compare.missing import missing_notes
from irdscale.compare.next_steps import next_steps
from irdscale.compare.samples import COLUMNS as SAMPLE_COLUMNS
from irdscale.compare.samples import about_samples
from irdscale.compare.study import read_study
from irdscale.compare.table import columns, rows
from irdscale.compare.verdict import cost_and_gain, failures, notes
from irdscale.compare.where import COLUMNS as MASK_COLUMNS
from irdscale.compare.where import where_masks_lie
from irdscale.report.pages import write_pages
from irdscale.report.sample_texts import label_word
from irdscale.report.terms import RELATIONS, of_comparison
from irdscale.utils.files import write_atomic

CAPTIONS = {
    "scores": "Test score by method: mean and 95 % t interval over the seeds. Grey dots are seeds. "
    "The band is the reference's interval. Slanted marks are breaks of the axis.",
    "parameters": "Test score against the number of trainable parameters beside the head. Methods of the same size "
    "are side by side; dashed lines are methods that train only the head. Slanted marks are breaks of the axis.",
    "differences": "Paired differences to the reference over the seeds, with 95 % t intervals. Blue: the reference is "
    "better. Orange: it is worse. Grey: the interval includes zero.",
    "rates": "Mean metric on the selection split by learning rate. The methods are side by side at each rate; rings "
    "are the chosen rates. Slanted marks are breaks of the axis.",
}


def write_files(output: Path) -> dict[str, Any]:
    """See `irdscale.compare.write_comparison`."""
    study = read_study(output)
    advice, commands = next_steps(study, output)
    claims = claims_of(study)
    values = {
        "result": study,
        "methods": study["methods"],
        "claims": claim_rows(claims),
        "claim_columns": CLAIM_COLUMNS,
        "how_to_read": how_to_read(study, claims),
        "columns": columns(study),
        "rows": rows(study),
        "main": cost_and_gain(study),
        "notes": [*missing_notes(study), *notes(study)],
        "failures": failures(study),
        "samples": about_samples(output, study),
        "sample_columns": SAMPLE_COLUMNS,
        "masks": where_masks_lie(output, study),
        "mask_columns": MASK_COLUMNS,
        "captions": CAPTIONS,
        "terms": of_comparison(study),
        "measures": RELATIONS,
        "next": advice,
        "next_commands": commands,
        "label": label_word(study["task"]["kind"]),
    }
    written = write_pages(output, "irdscale.compare", "compare", values, draw_all(study))
    table = output / "scores.csv"
    write_atomic(table, _csv(study))
    return {**written, "csv": str(table)}


def _csv(study: dict[str, Any]) -> str:
    """One row per method and seed; missing values are empty."""
    columns = ("samples", "params", "selection", "test")
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(("method", "seed", "learning_rate", *columns))
    for method in study["methods"]:
        for one in method["seeds"]:
            rows.writerow((method["name"], one["seed"], method["learning_rate"], *(one[name] for name in columns)))
    return stream.getvalue()
