"""The table of every configuration key in configs/README.md, made from the schema.

python -m tests.config_keys    writes it anew
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from irdscale.config.schema import RunConfig

PAGE = Path(__file__).resolve().parent.parent / "configs" / "README.md"
MARKS = ("<!-- keys -->\n", "<!-- /keys -->")
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def key_tables() -> str:
    """A heading and a table for each section, in the order of the schema."""
    schema = RunConfig.model_json_schema()
    lines, single = [], []
    for name, field in schema["properties"].items():
        rows = _rows(name, field, schema, required=name in schema["required"], seen={})
        if len(rows) == 1:
            single += rows
        else:
            lines += [f"### {name}", "", *_table(rows), ""]
    return "\n".join([*lines, "### output", "", *_table(single), ""])


def _table(rows: list[str]) -> list[str]:
    return ["| key | values | default | what it is |", "|---|---|---|---|", *rows]


def _rows(key: str, field: dict[str, Any], schema: dict[str, Any], required: bool, seen: dict[str, str]) -> list[str]:
    """The rows of a key: of all its keys where it is a section, unless these were shown under another key."""
    section = next((part["$ref"] for part in [field, *field.get("anyOf", [])] if "$ref" in part), None)
    rows = [] if section and "description" not in field else [_row(key, field, required, seen.get(section or ""))]
    if section and section not in seen:
        seen[section] = key
        parts = schema["$defs"][section.rpartition("/")[2]]
        for name, part in parts["properties"].items():
            rows += _rows(f"{key}.{name}", part, schema, name in parts.get("required", []), seen)
    return rows


def _row(key: str, field: dict[str, Any], required: bool, like: str | None) -> str:
    default = field.get("default")
    shown = "required" if required else "unset" if default is None else f"`{json.dumps(default)}`".replace('"', "")
    values = f"as `{like}`" if like else _values(field)
    text = field.get("description", "").replace("|", r"\|")
    return f"| `{key}` | {values} | {shown} | {text} |"


def _values(field: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "$ref" in field:
        return "section"
    if "anyOf" in field:
        parts = [_values(part) for part in field["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "array":
        return f"list of {_values(field['items'])}"
    words = {"boolean": "`true`, `false`", "string": "text", "object": "map"}
    bounds = [f"{sign} {str(field[name]).removesuffix('.0')}" for name, sign in BOUNDS.items() if name in field]
    return " ".join([words.get(field["type"], field["type"]), ", ".join(bounds)]).strip()


def page_with(tables: str) -> str:
    """configs/README.md with these tables."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    assert mark, f"{PAGE}: expected {MARKS[0].strip()} and {MARKS[1]}"
    return f"{before}{MARKS[0]}\n{tables}{MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with(key_tables()))
