"""Print samples and predictions to a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from irdscale.cli.console import readable

if TYPE_CHECKING:
    from rich.text import Text

# Tokens shown of a sample's beginning, and of its end.
SHOWN = 48
LEARNED = "bold green"


def print_predictions(rows: list[dict[str, Any]]) -> None:
    """Print predictions as JSON lines."""
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


def print_prediction(found: dict[str, Any]) -> None:
    """Print one prediction: the completion, the number, or the classes with the likeliest first."""
    if "probabilities" in found:
        order = sorted(found["probabilities"].items(), key=lambda each: -each[1])
        width = max(len(name) for name, _ in order)
        for name, share in order:
            print(f"{name:{width}}  {share:.4f}")
    else:
        print(found.get("completion", found.get("value")))


def print_data(result: dict[str, Any]) -> None:
    """Print each split's size, classes, token lengths and some samples, then the refused rows."""
    from rich.console import Console

    console = Console()
    coloured = console.is_terminal and console.color_system is not None and not console.no_color

    def line(text: str | Text, style: str | None = None) -> None:
        console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)

    marks = "coloured" if coloured else "in brackets"
    line(
        f"{result['task']}: {result['kind']}, at most {result['max_length']:,} tokens a sample; learned tokens {marks}"
    )
    for name, split in result["splits"].items():
        origin = "" if split["origin"] == name else f" ({split['origin']})"
        line(f"\n{name}{origin}: {split['samples']:,} samples", "bold")
        for text in _summary_lines(result, split):
            line(f"  {text}")
        for sample in split["shown"]:
            line(_sample(sample, coloured))
    refused = result["refused"]
    if refused["rows"]:
        line(f"\nrefused: {readable(refused['rows'])} row(s)", "bold")
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
    cut = f"{tokens['cut']:,} ({100 * tokens['cut_share']:.3g} %) {result['longer_are']} at {result['max_length']:,}"
    yield (
        f"tokens: median {tokens['median']:,}, 95 % {tokens['p95']:,}, longest {tokens['longest']:,}; "
        + (cut if tokens["cut"] else f"none is longer than {result['max_length']:,}")
    )
    if "learned_share" in tokens:
        yield f"learned: {100 * tokens['learned_share']:.3g} % of the tokens"
    if "blocks" in split:
        yield f"packed: {split['blocks']:,} blocks of {result['max_length']:,} tokens"


def _sample(sample: dict[str, Any], coloured: bool) -> Text:
    """A sample's tokens, separated by bars, with the learned ones marked."""
    from rich.text import Text

    label = f", {readable(sample['label'])}" if "label" in sample else ""
    text = Text(f"  row {sample['row']}{label}: ")
    pairs = list(zip(sample["tokens"], sample["learned"], strict=True))
    left = len(pairs) - 2 * SHOWN
    parts = [pairs] if left <= 0 else [pairs[:SHOWN], pairs[-SHOWN:]]
    for number, part in enumerate(parts):
        text.append(f" .. {left:,} tokens .. " if number else "")
        for learned, run in groupby(part, key=lambda pair: pair[1]):
            joined = "|".join(_printable(token) for token, _ in run)
            if learned and not coloured:
                joined = f"[{joined}]"
            text.append(joined, LEARNED if learned and coloured else None)
            text.append("|")
        text.right_crop(1)
    return text


def _printable(text: str) -> str:
    """The text, with line breaks and control characters as escapes."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
