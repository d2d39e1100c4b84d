"""The report of a search: Markdown with figures, and one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_report(output: Path | str, samples: bool = False, progress: bool = False) -> dict[str, Any]:
    """Write report.md, figures/ and report.html into the output folder of a finished search.

    Args:
        samples: also measure which samples drive the winner's mask, by one backward pass per sample; loads the model.
            The result is saved in fisher/drivers.json, and later reports show it too.

    Returns:
        {"markdown", "html", "figures"}: paths.

    Raises:
        InputError: the folder has no finished search, or its files are damaged; or the samples cannot be measured.
        RunError: the folder cannot be written.
    """
    from irdscale.report.write import write_files

    return write_files(Path(output), samples, progress)


__all__ = ["write_report"]
