"""compare.json, the result of a finished comparison, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError, create_model

from irdscale.errors import InputError
from irdscale.utils.files import read_json

FILE = "compare.json"


NUMBER = float | None
INTERVAL = {"mean": NUMBER, "low": NUMBER, "high": NUMBER, "n": int}
SEED = {"seed": int, "selection": NUMBER, "test": NUMBER, "samples": int | None, "pool": int | None}
METHOD = {
    **dict.fromkeys(("name", "label", "what"), str),
    **dict.fromkeys(("learning_rate", "evaluations", "fine_tunings", "params", "test_error"), NUMBER),
    "grid": [{"learning_rate": float, "selection": NUMBER}],
    "seeds": [{**SEED, "params": int | None, "error": str | None}],
    "test": INTERVAL,
    "selection": INTERVAL,
    "difference": ({**INTERVAL, "wins": int, "losses": int, "ties": int, "p": NUMBER}, None),
}
# What a report reads of compare.json. A dict stands for an object, a list for a list, a pair with None for a value that
# may be missing.
STUDY = {
    "task": {
        **dict.fromkeys(("name", "kind", "metric"), str),
        **dict.fromkeys(("train", "selection", "test"), int),
        "lower_is_better": bool,
        "origin": dict[str, Any],
        "pool": str | None,
    },
    "model": {"path": str, "parameters": int, "head": int},
    "reference": str,
    "seeds": list[int],
    "learning_rates": list[float],
    "methods": [METHOD],
    "warnings": list[str],
    "base": ({"selection": NUMBER, "test": NUMBER}, None),
    "fewest": int | None,
    "evaluations": int,
    "seconds": {"total": float},
    "config": {"compare": {"variants": dict[str, list[str]]}},
    "versions": dict[str, str | None],
}


def _type(shape: Any) -> Any:
    """The type that pydantic checks for a shape like `STUDY`."""
    if isinstance(shape, dict):
        fields: Any = {key: (_type(value), ...) for key, value in shape.items()}
        return create_model("object", **fields)
    if isinstance(shape, list):
        return list[_type(shape[0])]  # type: ignore[misc]
    return _type(shape[0]) | None if isinstance(shape, tuple) else shape


def read_study(output: Path) -> dict[str, Any]:
    """Read the compare.json of an output folder.

    Raises:
        InputError: it is missing, or not the result of a comparison.
    """
    path = output / FILE
    if not path.exists():
        raise InputError(f"found no {FILE}", "a finished comparison: run irdscale compare", where=output)
    study = read_json(path, "result of a comparison")
    try:
        TypeAdapter(_type(STUDY)).validate_python(study)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        found = "nothing" if first["type"] == "missing" else repr(first["input"])[:80]
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise InputError(f"not the result of a comparison: {key}: found {found}; {message}", where=path) from error
    names = [method["name"] for method in study["methods"]]
    if study["reference"] not in names:
        expected = f"one of its methods: {', '.join(names) or 'none'}"
        raise InputError(f"found {study['reference']!r}", expected, key="reference", where=path)
    return dict(study)
