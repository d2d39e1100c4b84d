"""The report of a finished comparison, from its compare.json and what its folder holds of samples and masks."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from irdscale.compare.figures import draw_all
from irdscale.compare.samples import COLUMNS as SAMPLE_COLUMNS
from irdscale.compare.samples import about_samples
from irdscale.compare.study import read_study
from irdscale.compare.table import columns, rows
from irdscale.compare.verdict import cost_and_gain, failures, notes, said_of
from irdscale.compare.where import COLUMNS as MASK_COLUMNS
from irdscale.compare.where import where_masks_lie
from irdscale.report.pages import write_pages
from irdscale.utils.files import write_atomic

CAPTIONS = {
    "scores": "Test score by method: mean and 95 % t interval over the seeds, which are the grey dots. "
    "The band is the interval of the reference.",
    "parameters": "Test score against the number of trainable parameters beside the head. Methods of the same size "
    "stand side by side; dashed lines train the head alone.",
    "differences": "Differences to the reference, seed by seed, with 95 % t intervals: blue where the interval says "
    "that the reference is better, orange where it says that it is worse, grey where it cannot be told.",
    "rates": "Mean metric on the selection split by learning rate. The large marks are the chosen rates.",
}


def write_files(output: Path) -> dict[str, Any]:
    """See `irdscale.compare.write_comparison`."""
    study = read_study(output)
    values = {
        "result": study,
        "methods": study["methods"],
        "columns": columns(study),
        "rows": rows(study),
        "main": cost_and_gain(study),
        "sentences": [said_of(study, method) for method in study["methods"]],
        "notes": notes(study),
        "failures": failures(study),
        "samples": about_samples(output, study),
        "sample_columns": SAMPLE_COLUMNS,
        "masks": where_masks_lie(output, study),
        "mask_columns": MASK_COLUMNS,
        "captions": CAPTIONS,
    }
    written = write_pages(output, "irdscale.compare", "compare", values, draw_all(study))
    table = output / "scores.csv"
    write_atomic(table, _csv(study))
    return {**written, "csv": str(table)}


def _csv(study: dict[str, Any]) -> str:
    """A row for each seed of each method; empty where there is no value."""
    columns = ("samples", "params", "selection", "test")
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(("method", "seed", "learning_rate", *columns))
    for method in study["methods"]:
        for one in method["seeds"]:
            rows.writerow((method["name"], one["seed"], method["learning_rate"], *(one[name] for name in columns)))
    return stream.getvalue()
