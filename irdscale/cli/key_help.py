"""What `irdscale help` shows: keys of the configuration and arguments of verbs, with their values and meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from irdscale.cli.app import VERB_KEYS
from irdscale.config.keys import Key, config_keys, inside, key_ending_in, key_names
from irdscale.errors import InputError
from irdscale.utils.suggestions import nearest


def describe(name: str | None) -> dict[str, Any]:
    """Facts about a key, a section, or an argument of verbs; all keys if there is no name.

    Returns:
        {"key", "meaning", "values", "default", "keys", "verbs"}: "keys" lists the keys of a section in the same way;
        "verbs" lists the verbs that take an argument.

    Raises:
        InputError: there is no such key; the error names the nearest.
    """
    keys = config_keys()
    if name is None:
        every = [*map(_facts, keys), *_arguments()]
        return {"key": None, "meaning": "", "values": "", "default": "", "keys": every, "verbs": []}
    for found in _arguments():
        if found["key"] == name:
            return found
    known = {key.name: key for key in keys}
    shared = next((key for key in keys if key.like and name.startswith(f"{key.name}.")), None)
    key = known.get(name if shared is None else f"{shared.like}{name.removeprefix(shared.name)}")
    if key is None:
        own = {argument["key"]: None for argument in _arguments()}
        near = key_ending_in(name) or nearest(name, [*key_names(), *own])
        expected = "" if near else "a key, such as search.ratio, or a section, such as search"
        raise InputError(f"unknown key{near}", expected, name)
    parts = [_facts(each) for each in inside(key.like or key.name, keys)] if key.is_section else []
    return {**_facts(key), "key": name, "keys": parts}


def _facts(key: Key) -> dict[str, Any]:
    return {
        "key": key.name,
        "meaning": key.text,
        "values": key.values,
        "default": key.default,
        "keys": [],
        "verbs": [],
    }


def _arguments() -> list[dict[str, Any]]:
    """The arguments of verbs; one that means different things to two verbs has one entry with both meanings."""
    found: dict[str, dict[str, Any]] = {}
    for verb, keys in VERB_KEYS.items():
        for key in keys:
            empty = {"key": key.name, "meaning": "", "values": "", "default": "unset", "keys": [], "verbs": []}
            facts = found.setdefault(key.name, empty)
            facts["verbs"].append(verb)
            values = key.value.replace("|", " or ")
            for name, text in (("meaning", key.meaning), ("values", values)):
                if text not in facts[name]:
                    facts[name] = f"{facts[name]} {text}".strip() if name == "meaning" else text
    return list(found.values())


def print_help(found: dict[str, Any]) -> None:
    """Print what `describe` found: one key in full, or a table of the keys of a section."""
    from rich.console import Console

    from irdscale.utils.terminal import Column, Table, print_line, print_table

    console, lines = Console(), []
    if found["key"] is not None:
        # Only texts of single keys: top-level sections have none.
        lines.append(f"{found['key']}: {found['meaning']}" if found["meaning"] else f"{found['key']}: a section")
        if not found["keys"]:
            lines += [f"  values   {found['values']}", f"  default  {found['default']}"]
        if found["key"] in VERB_KEYS:
            lines.append(f"  of the verb of this name: irdscale {found['key']} --help")
        if found["verbs"]:
            lines.append(f"  taken by {', '.join(f'irdscale {verb}' for verb in found['verbs'])}")
    for line in lines:
        print_line(console, line)
    rows = [
        (part["key"], " ".join(_short(part)))
        for part in found["keys"]
        if not part["keys"] and part["values"] != "section"
    ]
    if rows:
        print_table(console, Table([Column("key", text=True), Column("meaning", text=True, wraps=True)], rows))


def _short(part: dict[str, Any]) -> Iterator[str]:
    yield part["meaning"]
    if part["verbs"]:
        yield f"[irdscale {', '.join(part['verbs'])}]"
    else:
        named = part["default"] in ("required", "unset")
        yield f"[{part['values']}; {'' if named else 'default '}{part['default']}]"
