"""The base class of all sections of a configuration, and checks that several of them share."""

from __future__ import annotations

import re
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from irdscale.errors import InputError

Values = TypeVar("Values", bound=list | None)


class Section(BaseModel):
    """Keys of a configuration. A validator raises `InputError` with a key relative to its section."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def check_expressions(patterns: list[str] | None) -> list[str] | None:
    """Return `patterns`, or raise `InputError` where one is not a regular expression."""
    for pattern in patterns or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"found {pattern!r}", f"a regular expression ({error})") from None
    return patterns


def check_distinct(values: Values) -> Values:
    """Return `values`, or raise `InputError` where one stands twice."""
    if values is not None and len(set(values)) != len(values):
        raise InputError(f"found {values}", "distinct values")
    return values
