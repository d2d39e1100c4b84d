"""Comparison of methods: equal learning-rate grids and budgets, several seeds, all choices before the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_comparison(output: Path | str) -> dict[str, Any]:
    """Write compare.md, compare.html, scores.csv and figures/ into a finished comparison's output folder.

    Returns:
        {"markdown", "html", "csv", "figures"}: paths.

    Raises:
        InputError: the folder holds no finished comparison, or its compare.json is damaged.
        RunError: the folder cannot be written.
    """
    from irdscale.compare.report import write_files

    return write_files(Path(output))


__all__ = ["write_comparison"]
