"""What is made from the schema: the table of every key in configs/README.md, and configs/schema.json for editors.

python -m tests.config_keys    writes both anew
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from irdscale.config.keys import Key, config_keys, editor_schema

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PAGE, SCHEMA = CONFIGS / "README.md", CONFIGS / "schema.json"
MARKS = ("<!-- keys -->\n", "<!-- /keys -->")


def key_tables() -> str:
    """A heading and a table for each section, in the order of the schema."""
    tables: dict[str, list[str]] = {}
    for key in config_keys():
        # Top-level sections have no description, and no row.
        if key.text or not key.is_section:
            tables.setdefault(key.name.partition(".")[0], []).append(_row(key))
    single = [row for rows in tables.values() if len(rows) == 1 for row in rows]
    lines = []
    for section, rows in tables.items():
        if len(rows) > 1:
            lines += [f"### {section}", "", *_table(rows), ""]
    return "\n".join([*lines, "### output", "", *_table(single), ""])


def _table(rows: list[str]) -> list[str]:
    return ["| key | values | default | what it is |", "|---|---|---|---|", *rows]


def _row(key: Key) -> str:
    values = f"as `{key.like}`" if key.like else re.sub("'([^']*)'", r"`\1`", key.values)
    values = values.replace("true or false", "`true`, `false`")
    default = key.default if key.default in ("required", "unset") else f"`{key.default}`"
    return f"| `{key.name}` | {values} | {default} | {key.text.replace('|', chr(92) + '|')} |"


def page_with(tables: str) -> str:
    """configs/README.md with these tables."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    assert mark, f"{PAGE}: expected {MARKS[0].strip()} and {MARKS[1]}"
    return f"{before}{MARKS[0]}\n{tables}{MARKS[1]}{after}"


def schema_text() -> str:
    """configs/schema.json."""
    return json.dumps(editor_schema(), indent=1) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page_with(key_tables()))
    SCHEMA.write_text(schema_text())
