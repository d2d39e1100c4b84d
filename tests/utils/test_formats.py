import math

import pytest

from irdscale.utils import formats

GIB = 2**30


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (5.89e-7 * 3600, "2.1 ms"),
        (3e-6, "3.0 µs"),
        (0.0381, "38 ms"),
        (0.734, "0.73 s"),
        (1.94, "1.9 s"),
        (9.96, "10 s"),
        (38.2, "38 s"),
        (59.6, "1 min"),
        (95, "1 min 35 s"),
        (599.6, "10 min"),
        (754, "13 min"),
        (3599, "1 h"),
        (3600, "1 h"),
        (12000, "3 h 20 min"),
        (47.9 * 3600, "47 h 54 min"),
        (52 * 3600, "2 d 4 h"),
        (1e8, "1,157 d 10 h"),
        (math.inf, "unknown"),
    ],
)
def test_duration(seconds, text):
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 GiB"),
        (500, "0.49 KiB"),
        (1.6e6, "1.53 MiB"),
        (0.2 * GIB, "0.20 GiB"),
        (9.996 * GIB, "10.0 GiB"),
        (74 * GIB, "74.0 GiB"),
        (2000 * GIB, "2,000.0 GiB"),
    ],
)
def test_size(count, text):
    assert formats.size(count) == text
    assert formats.gib(count / GIB) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 TFLOP"), (2e9, "2 GFLOP"), (2.74e13, "27.4 TFLOP"), (6.61e18, "6,610,000 TFLOP")]
)
def test_operations(count, text):
    assert formats.operations(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (8.53e-8, "<0.0001 %"),
        (8.53e-6, "0.000853 %"),
        (0.0025, "0.25 %"),
        (0.68432, "68.4 %"),
        (1, "100 %"),
    ],
)
def test_percent(share, text):
    assert formats.percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.98765432, "0.9877"), (1e-5, "0.00001"), (-0.5, "-0.5"), (1234.5, "1,234"), (113570.0, "113,570")],
)
def test_number(value, text):
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("speed", "text"), [(0, ""), (2.54, "2.5/s"), (0.5, "2.0 s each"), (46500, "46,500/s"), (1 / 720, "12 min each")]
)
def test_speed_reads_as_the_larger_number(speed, text):
    assert formats.speed(speed) == text


def test_counts():
    assert formats.count(113570) == "113,570"
    assert [formats.counted(n, "seed") for n in (0, 1, 1200)] == ["0 seeds", "1 seed", "1,200 seeds"]
    assert formats.counted(2, "pass", "passes") == "2 passes"


def test_no_exponent_in_any_text():
    for power in range(-15, 16):
        for format in (formats.duration, formats.size, formats.operations, formats.percent, formats.number):
            assert "e" not in format(5.89 * 10.0**power).replace("unknown", "")
