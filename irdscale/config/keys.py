"""Every key of a configuration: its values, default and meaning, from the schema. And the schema for editors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from irdscale.config.schema import RunConfig

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_WORDS = {"boolean": "true or false", "string": "text", "object": "map"}


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        name: `section.key`.
        values: allowed values; choices stand in single quotes.
        default: default as YAML, "unset" or "required".
        text: description; empty for a top-level section.
        is_section: whether it contains keys.
        like: key of another section with the same keys, which follow that one only; empty for others.
    """

    name: str
    values: str
    default: str
    text: str
    is_section: bool = False
    like: str = ""


def config_keys() -> list[Key]:
    """All keys in the order of the schema, each section before its keys."""
    schema = RunConfig.model_json_schema()
    seen: dict[str, str] = {}
    return [
        key
        for name, field in schema["properties"].items()
        for key in _keys(name, field, schema, name in schema["required"], seen)
    ]


def key_names() -> list[str]:
    """The names of all keys, with those of sections that share their keys with another."""
    keys = config_keys()
    names = []
    for key in keys:
        names.append(key.name)
        if key.like:
            names += [f"{key.name}{each.name.removeprefix(key.like)}" for each in inside(key.like, keys)]
    return names


def key_ending_in(name: str) -> str:
    """` (did you mean "..."?)` with the first key whose last part is this name, or nothing."""
    found = next((key for key in key_names() if key.rpartition(".")[2] == name), None)
    return "" if found is None else f' (did you mean "{found}"?)'


def inside(section: str, keys: list[Key]) -> list[Key]:
    """The keys of a section, at every depth."""
    return [key for key in keys if key.name.startswith(f"{section}.")]


def _keys(name: str, field: dict[str, Any], schema: dict[str, Any], required: bool, seen: dict[str, str]) -> Iterator:
    reference = next((part["$ref"] for part in [field, *field.get("anyOf", [])] if "$ref" in part), None)
    like = seen.get(reference or "", "")
    default = "required" if required else _default(field)
    values = "section" if reference else _values(field)
    yield Key(name, values, default, field.get("description", ""), reference is not None, like)
    if reference is not None and not like:
        seen[reference] = name
        section = schema["$defs"][reference.rpartition("/")[2]]
        for part, inner in section["properties"].items():
            yield from _keys(f"{name}.{part}", inner, schema, part in section.get("required", []), seen)


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return "unset" if value is None else json.dumps(value).replace('"', "")


def _values(field: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "$ref" in field:
        return "section"
    if "anyOf" in field:
        parts = [_values(part) for part in field["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if "const" in field:
        return f"'{field['const']}'"
    if "enum" in field:
        return ", ".join(f"'{value}'" for value in field["enum"])
    if field["type"] == "array":
        return f"list of {_values(field['items'])}"
    bounds = [f"{sign} {str(field[name]).removesuffix('.0')}" for name, sign in BOUNDS.items() if name in field]
    return " ".join([_WORDS.get(field["type"], field["type"]), ", ".join(bounds)]).strip()


def editor_schema() -> dict[str, Any]:
    """The JSON schema of a configuration's YAML file, for editors."""
    schema = RunConfig.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        for field in section["properties"].values():
            _allow_one_text(field)
            # An empty section would be an error, and editors would write the default's address otherwise.
            field.pop("title", None)
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "title": "irdscale configuration"}


def _allow_one_text(field: dict[str, Any]) -> None:
    """Allow a text where a list of texts stands, as the loader does."""
    for part in list(field.get("anyOf", [])):
        if part.get("const") == "auto":
            return
    for part in [field, *field.get("anyOf", [])]:
        if part.get("type") == "array" and part.get("items") == {"type": "string"}:
            parts = field["anyOf"] if "anyOf" in field else [_taken(field)]
            field["anyOf"] = parts if {"type": "string"} in parts else [*parts, {"type": "string"}]
            return


def _taken(field: dict[str, Any]) -> dict[str, Any]:
    """Move what describes the value out of a field, which keeps its description and default."""
    return {name: field.pop(name) for name in list(field) if name not in ("description", "default", "title")}
