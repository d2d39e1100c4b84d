"""A run configuration's file: YAML and `key=value` overrides, and one clear line for what is wrong with them.

Paths that begin with `./` or `../` are relative to the YAML file they stand in, or to the working folder when they
come from the command line. Every error is one line with the file, the line, the key, what was found and expected.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from irdscale.config.schema import RunConfig, Section, default_scope, nearest
from irdscale.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _convert(node: yaml.Node, loader: _Loader, where: str, key: str, lines: dict[str, int]) -> Any:
    """Build plain values from YAML nodes, with the line of each key, refusing keys given twice."""
    lines[key] = node.start_mark.line + 1
    if isinstance(node, yaml.CollectionNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise InputError(f"{where}:{lines[key]}: {key}: found the tag {node.tag!r}; expected a plain value")
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = str(loader.construct_object(key_node))
            dotted = f"{key}.{name}" if key else name
            if name in values:
                raise InputError(f"{where}:{key_node.start_mark.line + 1}: {dotted}: given twice")
            values[name] = _convert(value_node, loader, where, dotted, lines)
            lines[dotted] = key_node.start_mark.line + 1
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_convert(item, loader, where, f"{key}.{i}", lines) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


def _parse_yaml(text: str, where: str) -> tuple[Any, dict[str, int]]:
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return (None if node is None else _convert(node, loader, where, "", lines)), lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}{line}: not YAML: {problem}") from error
    except RecursionError:
        raise InputError(f"{where}: not YAML: a value that contains itself") from None


def _local(value: Any, folder: Path) -> Any:
    if isinstance(value, str) and (value.startswith(("./", "../", "~/")) or value in (".", "..")):
        return str((folder / Path(value).expanduser()).resolve())
    return value


_PLACES = (
    ("model", "path"),
    ("task", "dataset"),
    ("task", "chat_template"),
    ("task", "pool", "mixed_with", "dataset"),
    ("train", "deepspeed"),
)


def _places(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The sections of `values` that name a place, with the key that does."""
    for *sections, key in _PLACES:
        inside: Any = values
        for section in sections:
            inside = inside.get(section) if isinstance(inside, dict) else None
        if isinstance(inside, dict) and key in inside:
            yield inside, key


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the explicit relative paths of `values` absolute, in place."""
    for section, key in _places(values):
        section[key] = _local(section[key], folder)


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides (values are YAML), and check everything.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown or given twice, a value has the wrong type or
            range, or two values contradict each other.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"{path}: cannot read the configuration: {reason}") from error
    values, lines = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: found no sections; expected model, task, fisher, search, train, distributed, compare, output"
        )
    _resolve_paths(values, path.parent)
    overridden = {_override(values, override) for override in overrides}
    config = _validate(values, str(path), lines, overridden)
    place = "command line" if any(key.startswith("compare.variants") for key in overridden) else str(path)
    for name, changed in config.compare.variants.items():
        changed_config(config, changed[1:], f"{place}: compare.variants.{name}")
    return config


def changed_config(config: RunConfig, overrides: list[str], where: str) -> RunConfig:
    """`config` with `section.key=value` overrides; `where` names their place in messages.

    Raises:
        InputError: as `load_config`.
    """
    values = config.model_dump(mode="json")
    for override in overrides:
        _override(values, override)
    return _validate(values, where, {}, set())


def _override(values: dict[str, Any], override: str) -> str:
    """Set what `section.key=value` says, in place; returns the key."""
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override}: expected key=value, such as search.ratio=0.01")
    parsed, _ = _parse_yaml(raw, f"{key}={raw}")
    branch: dict[str, Any] = {}
    leaf = branch
    *parents, last = key.split(".")
    for parent in parents:
        leaf[parent] = {}
        leaf = leaf[parent]
    leaf[last] = parsed
    _resolve_paths(branch, Path.cwd())
    _merge(values, branch, key)
    return key


def check_config(values: dict[str, Any], where: str) -> RunConfig:
    """The configuration that a search dumped into the file `where`.

    Raises:
        InputError: it is none that this version knows.
    """
    return _validate(values, where, {}, set())


def _merge(values: dict[str, Any], branch: dict[str, Any], key: str) -> None:
    for name, value in branch.items():
        inside = values.get(name)
        if isinstance(value, dict) and isinstance(inside, dict) and len(value) == 1 and "." in key:
            _merge(inside, value, key.partition(".")[2])
        else:
            values[name] = value


def _validate(values: dict[str, Any], where: str, lines: dict[str, int], overridden: set[str]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        found = _first([dict(problem) for problem in error.errors()])
        location = [part for part in found["loc"] if part not in _UNION_MEMBERS]
        dotted = ".".join(str(part) for part in location)
        message = _explain(found, location)
        named, colon, rest = message.partition(": ")
        if colon and re.fullmatch(r"[a-z_.]+", named) and found["type"] == "value_error":
            dotted = named if "." in named else ".".join(filter(None, [dotted, named]))
            message = rest
        if any(f"{dotted}.".startswith(f"{key}.") or f"{key}.".startswith(f"{dotted}.") for key in overridden):
            place = "command line"
        else:
            place = f"{where}:{lines[dotted]}" if dotted in lines else where
        raise InputError(f"{place}: {dotted}: {message}" if dotted else f"{place}: {message}") from None


# What pydantic adds to the location of an error inside `always_train`, which is a word or a list.
_UNION_MEMBERS = ("literal['auto']", "list[str]")


def _first(errors: list[dict[str, Any]]) -> dict[str, Any]:
    """The error to show: an unknown key before all others, since it often is the cause of them."""
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        return unknown[0]
    # Of a list, what is wrong inside it; not that it is no word.
    items = [error for error in errors if len(error["loc"]) > 1 and error["loc"][-2] == "list[str]"]
    if items and "literal['auto']" in errors[0]["loc"]:
        return items[0]
    return errors[0]


def _explain(error: dict[str, Any], location: list[Any]) -> str:
    """What was found and expected, for one pydantic error."""
    found, kind = error.get("input"), error["type"]
    shown = "nothing" if found is None else repr(found)
    if kind == "extra_forbidden":
        known = _fields_at(location[:-1])
        return f"unknown key{nearest(str(location[-1]), known) or '; expected one of ' + ', '.join(known)}"
    if kind == "missing":
        section = _section_at(location)
        return (
            f"missing; expected a section with {', '.join(_required(section))}"
            if section
            else "missing; expected a value"
        )
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type"):
        return f"found {shown}; expected a section with keys such as {', '.join(_fields_at(location)[:3])}"
    if "literal['auto']" in error["loc"]:
        return f"found {shown}; expected 'auto' or a list of regular expressions"
    if kind in ("too_short", "too_long"):
        size = error["ctx"].get("min_length", error["ctx"].get("max_length"))
        items = "1 item" if size == 1 else f"{size} items"
        return f"found {shown}; expected at {'least' if kind == 'too_short' else 'most'} {items}"
    if kind == "string_too_short":
        return "found ''; expected some text"
    message = str(error["msg"]).removeprefix("Input should be ")
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", message)
        return f"found {shown}{nearest(str(found), choices)}; expected {message}"
    return f"found {shown}; expected {message[0].lower()}{message[1:]}"


def _section_at(location: list[Any]) -> type[Section] | None:
    """The section that a location names, or None where it names a value."""
    section: Any = RunConfig
    for part in location:
        annotation = section.model_fields[part].annotation
        members = (annotation, *get_args(annotation))
        section = next((t for t in members if isinstance(t, type) and issubclass(t, Section)), None)
        if section is None:
            return None
    return section


def _required(section: type[Section]) -> list[str]:
    return [name for name, field in section.model_fields.items() if field.is_required()]


def _fields_at(location: list[Any]) -> list[str]:
    section = _section_at(location)
    return list(section.model_fields) if section else []


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def without_places(config: dict[str, Any]) -> dict[str, Any]:
    """A dumped configuration without the paths of what is read, which tell nothing of what is there."""
    found = copy.deepcopy(config)
    for section, key in _places(found):
        del section[key]
    return found


def same_search(config: dict[str, Any]) -> dict[str, Any]:
    """What two dumped configurations must share to be one search: all but where they run, read and write."""
    config = without_places(config)
    fisher = config["fisher"] | {"scope": config["fisher"]["scope"] or default_scope(config["task"]["kind"])}
    search = {k: v for k, v in config["search"].items() if k not in ("runner", "ray")}
    kept = {k: v for k, v in config.items() if k not in ("output", "distributed", "compare")}
    return kept | {"fisher": fisher, "search": search}


def config_changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`section.key: old -> new` for every leaf that differs."""
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += config_changes(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key}: {before} -> {after}")
    return changes


def settings_of_ranks(config: RunConfig, zero: dict[str, Any] | None) -> dict[str, Any]:
    """section.key -> its value, for all that must be the same on every rank; places may differ by node.

    Args:
        zero: the contents of `train.deepspeed`.
    """
    facts = config.model_dump(mode="json", exclude={"output"})
    for section, key in _places(facts):
        del section[key]
    compared = {**dict(leaves(facts)), "train.deepspeed": zero}
    return {key: json.dumps(value, sort_keys=True) for key, value in compared.items()}


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key` and value of all that nested sections, or lists of them, hold."""
    for key, inside in values.items():
        if isinstance(inside, list) and inside and isinstance(inside[0], dict):
            inside = {str(number): item for number, item in enumerate(inside)}
        if isinstance(inside, dict):
            yield from leaves(inside, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inside
