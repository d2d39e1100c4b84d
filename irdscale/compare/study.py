"""compare.json, the result of a finished comparison, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from irdscale.errors import InputError
from irdscale.utils.files import read_json

FILE = "compare.json"


class _Interval(TypedDict):
    mean: float | None
    low: float | None
    high: float | None
    n: int


class _Paired(_Interval):
    wins: int
    losses: int
    ties: int
    p: float | None


class _Point(TypedDict):
    learning_rate: float
    selection: float | None


class _Seed(TypedDict):
    seed: int
    selection: float | None
    test: float | None
    samples: int | None
    pool: int | None
    params: int | None
    error: str | None


class _Method(TypedDict):
    name: str
    label: str
    what: str
    learning_rate: float | None
    grid: list[_Point]
    evaluations: float | None
    fine_tunings: float | None
    params: float | None
    seeds: list[_Seed]
    test: _Interval
    test_error: float | None
    selection: _Interval
    difference: _Paired | None


class _Task(TypedDict):
    name: str
    kind: str
    metric: str
    lower_is_better: bool
    train: int
    selection: int
    test: int
    origin: dict[str, Any]
    pool: str | None


class _Model(TypedDict):
    path: str
    parameters: int
    head: int


class _Base(TypedDict):
    selection: float | None
    test: float | None


class _Seconds(TypedDict):
    total: float


class _Compare(TypedDict):
    variants: dict[str, list[str]]


class _Config(TypedDict):
    compare: _Compare


class _Study(TypedDict):
    task: _Task
    model: _Model
    reference: str
    seeds: list[int]
    learning_rates: list[float]
    methods: list[_Method]
    warnings: list[str]
    base: _Base | None
    fewest: int | None
    evaluations: int
    seconds: _Seconds
    config: _Config
    versions: dict[str, str | None]


def read_study(output: Path) -> dict[str, Any]:
    """Read the compare.json of an output folder.

    Raises:
        InputError: it is missing, or not the result of a comparison.
    """
    path = output / FILE
    if not path.exists():
        raise InputError(f"found no {FILE}", "a finished comparison: run irdscale compare", where=str(output))
    study = read_json(path, "result of a comparison")
    try:
        TypeAdapter(_Study).validate_python(study)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        found = "nothing" if first["type"] == "missing" else repr(first["input"])[:80]
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise InputError(f"not the result of a comparison: {key}: found {found}; {message}", where=str(path)) from error
    names = [method["name"] for method in study["methods"]]
    if study["reference"] not in names:
        known = ", ".join(names) or "none"
        expected = f"one of its methods: {known}"
        raise InputError(f"found {study['reference']!r}", expected, key="reference", where=str(path))
    return dict(study)
