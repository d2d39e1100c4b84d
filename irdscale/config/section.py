"""The base class of all sections of a configuration, and checks that several of them share."""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

from irdscale.errors import InputError

Values = TypeVar("Values", bound=list | None)


class Section(BaseModel):
    """Keys of a configuration. A validator raises `InputError` with a key relative to its section."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists_of_one(cls, values: Any) -> Any:
        """Take one text for a list of one, where only a list of texts is meant."""
        if not isinstance(values, dict):
            return values
        return {name: [value] if _means_list(cls, name, value) else value for name, value in values.items()}


def _means_list(section: type[Section], name: str, value: Any) -> bool:
    field = section.model_fields.get(name)
    return isinstance(value, str) and bool(value) and field is not None and _is_list_of_texts(field.annotation)


def _is_list_of_texts(annotation: Any) -> bool:
    """Whether a type is a list of texts, or nothing; but neither one text nor one of some words."""
    members = [annotation, *get_args(annotation)] if get_origin(annotation) is not list else [annotation]
    if any(member is str or get_origin(member) is Literal for member in members):
        return False
    lists = [member for member in members if get_origin(member) is list]
    return bool(lists) and all(get_args(each) == (str,) for each in lists)


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
