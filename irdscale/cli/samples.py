"""Print samples and predictions to a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from irdscale.cli.console import readable
from irdscale.utils.formats import counted, percent
from irdscale.utils.terminal import print_line, width_of

if TYPE_CHECKING:
    from rich.text import Text

# Tokens shown of a sample's beginning, and of its end.
SHOWN = 48
INDENT = "    "
LEARNED = "bold green"


def print_predictions(rows: list[dict[str, Any]]) -> None:
    """Print predictions as JSON lines."""
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


def print_prediction(found: dict[str, Any]) -> None:
    """Print one prediction: the completion, the number, or the classes with the likeliest first."""
    from rich.console import Console

    console = Console()
    if "probabilities" in found:
        order = sorted(found["probabilities"].items(), key=lambda each: -each[1])
        width = max(len(name) for name, _ in order)
        for name, share in order:
            print_line(console, f"{name:{width}}  {share:.4f}")
    else:
        for text in str(found.get("completion", found.get("value"))).split("\n"):
            print_line(console, text)


def print_data(result: dict[str, Any]) -> None:
    """Print each split's size, classes, token lengths and some samples, then the refused rows."""
    from rich.console import Console

    console = Console()
    coloured = console.is_terminal and console.color_system is not None and not console.no_color

    def line(text: str | Text, style: str | None = None) -> None:
        print_line(console, text, style)

    marks = "coloured" if coloured else "in brackets"
    line(
        f"{result['task']}: {result['kind']}, at most {result['max_length']:,} tokens a sample; learned tokens {marks}"
    )
    for name, split in result["splits"].items():
        origin = "" if split["origin"] == name else f" ({split['origin']})"
        line("")
        line(f"{name}{origin}: {counted(split['samples'], 'sample')}", "bold")
        for text in _summary_lines(result, split):
            line(f"  {text}")
        for sample in split["shown"]:
            line(_sample(sample, coloured, width_of(console)))
    refused = result["refused"]
    if refused["rows"]:
        line("")
        line(f"refused: {counted(refused['rows'], 'row')}", "bold")
        for each in refused["first"]:
            line(f"  {each['why']}")
        if refused["rows"] > len(refused["first"]):
            line(f"  and {readable(refused['rows'] - len(refused['first']))} more")


def _summary_lines(result: dict[str, Any], split: dict[str, Any]) -> Iterator[str]:
    if "classes" in split:
        yield "classes: " + ", ".join(f"{name} {count:,}" for name, count in split["classes"].items())
    if "values" in split:
        yield "values: " + ", ".join(f"{name} {readable(value)}" for name, value in split["values"].items())
    if "right_choices" in split:
        counts = split["right_choices"].items()
        yield "right choice: " + ", ".join(f"number {number} {count:,} times" for number, count in counts)
    tokens = split["tokens"]
    cut = f"{tokens['cut']:,} ({percent(tokens['cut_share'])}) {result['longer_are']} at {result['max_length']:,}"
    yield (
        f"tokens: median {tokens['median']:,}, 95 % {tokens['p95']:,}, longest {tokens['longest']:,}; "
        + (cut if tokens["cut"] else f"none is longer than {result['max_length']:,}")
    )
    if "learned_share" in tokens:
        yield f"learned: {percent(tokens['learned_share'])} of the tokens"
    if "blocks" in split:
        yield f"packed: {split['blocks']:,} blocks of {result['max_length']:,} tokens"


def _sample(sample: dict[str, Any], coloured: bool, width: int | None = None) -> Text:
    """A sample's tokens, separated by bars, with the learned ones marked; broken between tokens after `width` cells."""
    from rich.cells import cell_len
    from rich.text import Text

    label = f", {readable(sample['label'])}" if "label" in sample else ""
    parts: list[tuple[str, str]] = [(f"  row {sample['row']}{label}: ", "")]
    used, end = cell_len(parts[0][0]), len(sample["tokens"]) - SHOWN
    for place in range(len(sample["tokens"])):
        if SHOWN < place < end:
            continue
        left_out = SHOWN <= place < end
        pieces = [(f" .. {end - SHOWN:,} tokens .. ", "")] if left_out else _token(sample, place, coloured)
        cells = sum(cell_len(text) for text, _ in pieces)
        if width is not None and used + cells > width:
            parts.append((f"\n{INDENT}", ""))
            used = len(INDENT)
        parts += pieces
        used += cells
    runs = groupby(parts, key=lambda part: part[1])
    return Text.assemble(*(("".join(text for text, _ in run), style) for style, run in runs))


def _token(sample: dict[str, Any], place: int, coloured: bool) -> list[tuple[str, str]]:
    """Texts and styles of a token and the bar after it; without colours, a run of learned tokens is in brackets."""
    learned, size = sample["learned"], len(sample["learned"])
    starts, ends = ((0, size - SHOWN), (SHOWN - 1, size - 1)) if size > 2 * SHOWN else ((0,), (size - 1,))
    begins = place in starts or not learned[place - 1]
    over = place in ends or not learned[place + 1]
    bar = "" if place in ends else "|"
    if not learned[place]:
        return [(_printable(sample["tokens"][place]) + bar, "")]
    opening, closing, style = ("", "", LEARNED) if coloured else ("[" * begins, "]" * over, "")
    # The bar inside a run of learned tokens is part of it.
    return [(opening + _printable(sample["tokens"][place]) + closing, style), (bar, "" if over else style)]


def _printable(text: str) -> str:
    """The text, with line breaks and control characters as escapes."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
