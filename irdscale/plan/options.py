"""The plan's own arguments among the key=value ones of the command line."""

from __future__ import annotations

from typing import Any

from irdscale.errors import InputError
from irdscale.utils.suggestions import nearest

NUMBERS = ("nodes", "gpus_per_node", "tokens", "train_samples")
KEYS = (*NUMBERS, "gpu")


def split_options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The plan's own options, as `run_plan` takes them, and the other arguments.

    Raises:
        InputError: a value is no number of at least 1, a key is given twice, or it is nobody's.
    """
    given: dict[str, Any] = {}
    rest: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in KEYS:
            if equals and "." not in key and nearest(key, KEYS) and key != "output":
                raise InputError(f"{key}: unknown key{nearest(key, KEYS)}; expected one of {', '.join(KEYS)}")
            rest.append(argument)
        elif key in given:
            raise InputError(f"{key}: given twice")
        elif key == "gpu":
            given[key] = value
        elif not value.isdecimal() or int(value) < 1:
            raise InputError(f"{key}: found {value!r}; expected a number of at least 1")
        else:
            given[key] = int(value)
    return given, rest
