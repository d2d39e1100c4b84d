"""The report of a search, for people: Markdown with pictures, and one HTML file that holds everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_report(output: Path | str) -> dict[str, Any]:
    """Write report.md, figures/ and report.html into the output folder of a finished search.

    Returns:
        {"markdown", "html", "figures"}: paths.

    Raises:
        InputError: the folder holds no finished search, or its files are damaged.
        RunError: the folder cannot be written.
    """
    from irdscale.report.write import write_files

    return write_files(Path(output))


__all__ = ["write_report"]
