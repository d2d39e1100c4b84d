"""The plan's own key=value arguments on the command line."""

from __future__ import annotations

from typing import Any

from irdscale.errors import InputError
from irdscale.utils.suggestions import nearest

NUMBERS = ("nodes", "gpus_per_node", "tokens", "train_samples")
KEYS = (*NUMBERS, "gpu")


def split_options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Separate the keyword arguments of `run_plan` from all others.

    Raises:
        InputError: a value is not a number of at least 1, or a key is repeated or unknown.
    """
    given: dict[str, Any] = {}
    rest: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in KEYS:
            if equals and "." not in key and nearest(key, KEYS) and key != "output":
                raise InputError(f"unknown key{nearest(key, KEYS)}", f"one of {', '.join(KEYS)}", key=key)
            rest.append(argument)
        elif key in given:
            raise InputError("given twice", key=key)
        elif key == "gpu":
            given[key] = value
        elif not value.isdecimal() or int(value) < 1:
            raise InputError(f"found {value!r}", "a number of at least 1", key=key)
        else:
            given[key] = int(value)
    return given, rest
