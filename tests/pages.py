"""What a reader of a page sees."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import ImageFont

PIXELS = 16.0


class Cells(HTMLParser):
    """What a page holds.

    Attributes:
        rows: cell texts of each row of every table.
        tables: classes and rows of each table; a cell is its text and its classes.
        tags, loads: the tags seen, and what the page would load.
        text: the text that is seen.
        terms: the terms that are explained, each with its place in `text`.
        blocks: class and text of each preformatted block.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tables: list[tuple[str, list[list[tuple[str, str, str]]]]] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.terms: list[tuple[str, int]] = []
        self.blocks: list[tuple[str, str]] = []
        self.style = text.partition("<style>")[2].partition("</style>")[0]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        kind = dict(attrs).get("class") or ""
        if tag == "table":
            self.tables.append((kind, []))
        elif tag == "tr":
            self.rows.append([])
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.tables[-1][1][-1].append((tag, kind, ""))
        elif tag == "pre":
            self.blocks.append((kind, ""))
        elif tag == "dfn":
            self.terms.append(("", len(self.text)))

    def handle_data(self, data: str) -> None:
        last = self.tags[-1] if self.tags else ""
        if last in ("style", "title"):
            return
        self.text += data
        if last == "dfn" and not self.terms[-1][0]:
            self.terms[-1] = (data, self.terms[-1][1])
        if last == "pre":
            self.blocks[-1] = (self.blocks[-1][0], self.blocks[-1][1] + data)
        if self.rows and self.rows[-1] and last in ("td", "th"):
            self.rows[-1][-1] += data.strip()
            tag, kind, text = self.tables[-1][1][-1][-1]
            self.tables[-1][1][-1][-1] = (tag, kind, text + data.strip())


def least_widths(page: Cells) -> list[float]:
    """The least width of each table, in pixels, by the page's own style and a wide font."""
    return [_least_width(kind, rows, page.style) for kind, rows in page.tables]


def _least_width(kind: str, rows: list[list[tuple[str, str, str]]], style: str) -> float:
    wide = "wide" in kind
    rules = {
        "font": _rem(style, "table.wide" if wide else "table", "font-size"),
        "padding": 2 * _rem(style, "table.wide th, table.wide td" if wide else "th, td", "padding"),
    }
    wraps = "white-space: normal" in _rule(style, "table.wide th, table.wide td")
    font = ImageFont.truetype(_font(), round(100 * rules["font"]))
    widths: dict[int, float] = {}
    for row in rows:
        for place, (tag, classes, text) in enumerate(row):
            name = next((one for one in ("text", "left") if one in classes.split()), "")
            if name:
                found = _rem(style, "td.text" if name == "text" else "th.left, td.left", "min-width")
            else:
                parts = text.split() if tag == "th" or (wide and wraps) else [text]
                found = max((font.getlength(part) for part in parts), default=0.0) / 100
            widths[place] = max(widths.get(place, 0.0), found + rules["padding"])
    return sum(widths.values())


def _rule(style: str, selector: str) -> str:
    found = re.search(rf"(?m)^{re.escape(selector)} {{([^}}]*)}}", style)
    assert found, selector
    return found[1]


def _rem(style: str, selector: str, name: str) -> float:
    """The last length of a property, in pixels."""
    found = re.search(rf"{name}: (?:[\d.]+rem )?([\d.]+)rem", _rule(style, selector))
    assert found, (selector, name)
    return float(found[1]) * PIXELS


def _font() -> str:
    """DejaVu Sans, which matplotlib brings."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf")
