"""Numbers as text, the same in every message, table and bar: 1.9 s, 0.52 GiB, 12.3 TFLOP, 113,570, 0.25 %.

Results as JSON, the ledger and other files keep the raw numbers.
"""

from __future__ import annotations

import math

GIB = 2**30
_HOUR, _MINUTE = 3600, 60
# From so many hours on, a duration is in days.
_HOURS_AS_DAYS = 48
# From so many minutes on, a duration has no seconds.
_MINUTES_ALONE = 10


def duration(seconds: float) -> str:
    """`1.9 s`, `38 s`, `1 min 35 s`, `12 min`, `3 h 20 min` or `2 d 4 h`; short ones as `38 ms` or `58 µs`."""
    if not math.isfinite(seconds):
        return "unknown"
    seconds = max(0.0, seconds)
    if seconds < 59.5:
        return _short_duration(seconds)
    if round(seconds) < _MINUTES_ALONE * _MINUTE:
        return _two_units(round(seconds), _MINUTE, "min", "s")
    minutes = round(seconds / _MINUTE)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 60 * _HOURS_AS_DAYS:
        return _two_units(minutes, 60, "h", "min")
    return _two_units(round(seconds / _HOUR), 24, "d", "h")


def _short_duration(seconds: float) -> str:
    if seconds == 0 or seconds >= 0.095:
        return f"{_two_digits(seconds)} s"
    if seconds >= 0.95e-4:
        return f"{_two_digits(1e3 * seconds)} ms"
    return f"{_two_digits(1e6 * seconds)} µs"


def _two_digits(value: float) -> str:
    if value == 0 or value >= 9.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def _two_units(value: int, of_large: int, large: str, small: str) -> str:
    whole, rest = divmod(value, of_large)
    return f"{whole:,} {large}" + (f" {rest} {small}" if rest else "")


def size(count: float) -> str:
    """A number of bytes in GiB, with two digits after the point below 10; less than 0.1 GiB in MiB or KiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if count == 0 or count >= 0.095 * unit:
            return f"{_after_the_point(count / unit)} {name}"
    return f"{_after_the_point(count / 2**10)} KiB"


def gib(count: float) -> str:
    """A number of GiB, as `size` shows it."""
    return size(count * GIB)


def _after_the_point(value: float) -> str:
    return "0" if value == 0 else f"{value:,.2f}" if value < 9.995 else f"{value:,.1f}"


def operations(count: float) -> str:
    """A number of floating-point operations: `27.4 TFLOP`; less than 0.1 TFLOP in GFLOP."""
    scale, name = (1e12, "TFLOP") if count == 0 or count >= 0.095e12 else (1e9, "GFLOP")
    return f"{number(count / scale, 3)} {name}"


def number(value: float, digits: int = 4) -> str:
    """A number with so many significant digits at least, all before the point, and no exponent: `0.9877`, `12,345`."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: float) -> str:
    """A whole number: `113,570`."""
    return f"{value:,.0f}"


def counted(value: int, noun: str, several: str | None = None) -> str:
    """A number of things: `1 seed`, `2 seeds`, `1,200 GPUs`."""
    return f"{value:,} {noun if value == 1 else several or noun + 's'}"


def percent(share: float, digits: int = 3) -> str:
    """A share of 1 as text: `0.25 %`, `68.4 %`; shares below 0.0001 % as `<0.0001 %`."""
    if 0 < abs(share) < 1e-6:
        return "<0.0001 %"
    return f"{number(100 * share, digits)} %"


def speed(per_second: float) -> str:
    """Items per second, or time per item if that number is larger: `8.6/s`, `5.6 s each`; empty if unknown."""
    if per_second <= 0:
        return ""
    return f"{_two_digits(per_second)}/s" if per_second >= 1 else f"{duration(1 / per_second)} each"
