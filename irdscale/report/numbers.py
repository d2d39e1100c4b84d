"""Numbers as text in reports and figures. Every format of a report is here."""

from __future__ import annotations

import numpy as np

from irdscale.utils.formats import count


def plain(value: float) -> str:
    """A number in full, without an exponent: 0.00001, 12, 1,200,000."""
    text = np.format_float_positional(abs(float(f"{value:.10g}")), trim="-")
    whole, point, rest = text.partition(".")
    return f"{'-' if value < 0 and text != '0' else ''}{int(whole):,}{point}{rest}"


def rounded(value: float, digits: int = 2) -> str:
    """A number with so many significant digits, in full."""
    return plain(float(f"{value:.{digits}g}"))


def sized(value: object) -> str:
    """A label, length, loss or trace; a dash if unknown."""
    if value is None:
        return "–"
    return count(value) if isinstance(value, int) else rounded(value, 4) if isinstance(value, float) else str(value)
