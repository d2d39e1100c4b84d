"""Lines and tables on a terminal, wrapped between words and never wider than it; as plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

GAP = 2
# Units that stay on the line of their number.
UNITS = frozenset(("GiB", "MiB", "KiB", "TFLOP", "GFLOP", "µs", "ms", "s", "min", "h", "d", "%"))


def wrapped(text: str, width: int | None) -> list[str]:
    """The lines of a text, broken between words, not between a number and its unit; a longer word stays whole.

    Lines after the first keep the text's indentation.

    Args:
        width: cells of a line; None for one line.
    """
    if width is None or cell_len(text) <= width:
        return [text]
    indent = text[: len(text) - len(text.lstrip(" "))]
    lines, line = [], ""
    for word in _words(text.strip()):
        longer = f"{line} {word}" if line else indent + word
        if line and cell_len(longer) > width:
            lines.append(line)
            longer = indent + word
        line = longer
    return [*lines, line]


def _words(text: str) -> list[str]:
    """The words of a text, each number with its unit."""
    found: list[str] = []
    for word in text.split(" "):
        if found and found[-1][-1:].isdigit() and word.strip("(),.;:") in UNITS:
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def width_of(console: Console) -> int | None:
    """The cells of a line on a terminal; None elsewhere, where lines have any length."""
    return console.width if console.is_terminal else None


def print_line(console: Console, text: str | Text = "", style: str | None = None) -> None:
    """Print a line of text as it is, without markup; on a terminal, wrapped between words."""
    if isinstance(text, str):
        # As a `Text`, it is printed as it is: rich replaces words such as :x: in a string.
        text = Text("\n".join(wrapped(text, width_of(console))))
    console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        head: heading, which may be broken between words.
        text: whether the cells are text, aligned to the left, rather than numbers.
        drop: rank among the columns left out where the table is too wide, the largest first; 0 is never left out.
        wraps: whether its cells may be broken between words where the table is still too wide.
    """

    head: str
    text: bool = False
    drop: int = 0
    wraps: bool = False


@dataclass(frozen=True)
class Table:
    """A table that fits the terminal; prints with `print_table`, or below bars.

    Attributes:
        rows: the cells of each row.
        styles: the style of each row; none if shorter.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    title: str = ""
    styles: Sequence[str | None] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = options.max_width if console.is_terminal else None
        for line, style in self.lines(width):
            yield Text(line, style=style or "", no_wrap=True, overflow="ignore")

    def lines(self, width: int | None) -> Iterator[tuple[str, str | None]]:
        """The lines of the table and their styles.

        Args:
            width: cells of a line; None for any number.
        """
        for line in wrapped(self.title, width) if self.title else ():
            yield line, "bold"
        shown, widths = self._fitted(width)
        for line in self._row([self.columns[place].head for place in shown], shown, widths):
            yield line, "dim"
        for number, row in enumerate(self.rows):
            style = self.styles[number] if number < len(self.styles) else None
            for line in self._row([row[place] for place in shown], shown, widths):
                yield line, style

    def _fitted(self, width: int | None) -> tuple[list[int], dict[int, int]]:
        """The places of the shown columns, and place -> width.

        Headings are broken first, then columns left out, then cells broken.
        """
        shown = list(range(len(self.columns)))
        while True:
            widths = {place: self._width(place) for place in shown}
            excess = 0 if width is None else sum(widths.values()) + GAP * (len(shown) - 1) - width
            droppable = [place for place in shown if self.columns[place].drop]
            least = {place: self._least(place, wraps=not droppable) for place in shown}
            spare = {place: widths[place] - least[place] for place in shown}
            if excess <= sum(spare.values()) or not droppable:
                break
            shown.remove(max(droppable, key=lambda place: self.columns[place].drop))
        for place in sorted(spare, key=lambda place: -spare[place]):
            taken = min(spare[place], max(0, excess))
            widths[place] -= taken
            excess -= taken
        return shown, widths

    def _width(self, place: int) -> int:
        return max(cell_len(text) for text in self._texts(place))

    def _least(self, place: int, wraps: bool) -> int:
        """The width of a column with its heading, and if `wraps` its cells, broken between words."""
        head, *cells = self._texts(place)
        longest = _longest_word if wraps and self.columns[place].wraps else cell_len
        return max([_longest_word(head), *map(longest, cells)])

    def _texts(self, place: int) -> list[str]:
        return [self.columns[place].head, *(row[place] for row in self.rows)]

    def _row(self, cells: list[str], shown: list[int], widths: dict[int, int]) -> Iterator[str]:
        parts = [wrapped(cell, widths[place]) for cell, place in zip(cells, shown, strict=True)]
        for number in range(max(map(len, parts))):
            line = (" " * GAP).join(
                _aligned(part[number] if number < len(part) else "", widths[place], self.columns[place].text)
                for part, place in zip(parts, shown, strict=True)
            )
            yield line.rstrip()


def _aligned(text: str, width: int, left: bool) -> str:
    space = " " * max(0, width - cell_len(text))
    return text + space if left else space + text


def _longest_word(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=0)


def print_table(console: Console, table: Table) -> None:
    """Print a table."""
    console.print(table, crop=False, markup=False, highlight=False)
