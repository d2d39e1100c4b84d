"""Fill templates and write the pages of a report: Markdown beside its figures, and HTML that contains them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from irdscale.report.terms import as_html, as_markdown
from irdscale.report.verdict import with_error
from irdscale.utils.files import write_atomic
from irdscale.utils.formats import count, duration, number, percent

# Pixels of a figure's file for one pixel of the page.
_SCALE = 1.5


def write_pages(
    output: Path,
    package: str,
    name: str,
    values: dict[str, Any],
    figures: dict[str, bytes],
    filters: dict[str, Callable[[Any], Any]] | None = None,
) -> dict[str, Any]:
    """Write figures/*.png, `name`.md and `name`.html into `output`.

    Args:
        package: package of the templates `name`.md.jinja and `name`.html.jinja, which can include those of
            irdscale.report.
        values: variables of the templates, besides `figures` in base64 and their `widths` on the page.
        figures: name -> PNG.
        filters: name -> filter of the templates, besides `score`, `tested`, `percent`, `count`, `number`, `duration`,
            `cell`, `defined` and `bold`.

    Returns:
        {"markdown", "html", "figures"}: paths.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("irdscale.report", ".")]),
        autoescape=lambda name: bool(name and "html" in name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": score, "tested": tested, "percent": percent, "duration": duration}
    environment.filters |= {"count": count, "number": sized, "defined": as_html, "bold": as_markdown}
    environment.filters |= {"cell": _markdown_cell, **(filters or {})}
    values = values | {"figures": {name: base64.b64encode(data).decode() for name, data in figures.items()}}
    values["widths"] = {name: _width(data) for name, data in figures.items()}
    pages = {page: environment.get_template(f"{page}.jinja").render(values) for page in (f"{name}.md", f"{name}.html")}
    for figure, data in figures.items():
        write_atomic(output / "figures" / f"{figure}.png", data)
    for page, text in pages.items():
        write_atomic(output / page, text)
    return {
        "markdown": str(output / f"{name}.md"),
        "html": str(output / f"{name}.html"),
        "figures": [str(output / "figures" / f"{figure}.png") for figure in figures],
    }


def _width(data: bytes) -> int:
    """Pixels of a PNG's width on the page."""
    return round(int.from_bytes(data[16:20], "big") / _SCALE)


def score(value: float | None) -> str:
    """A metric with four decimals."""
    return "failed" if value is None else f"{value:.4f}"


def tested(entry: Mapping[str, Any]) -> str:
    """The test metric of a result's entry, with its standard error if known."""
    return with_error(entry["test_metric"], entry["test_error"], absent="failed")


def sized(value: object) -> str:
    """A label, length, loss or trace; a dash if unknown."""
    if value is None:
        return "–"
    return count(value) if isinstance(value, int) else number(value) if isinstance(value, float) else str(value)


def _markdown_cell(value: object) -> str:
    """Text escaped for a Markdown table cell."""
    text = " ".join(str(value).split())
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return text
