"""Read a run configuration: a YAML file and `key=value` overrides, with one clear line for each mistake.

Paths that begin with `./` or `../` are relative to the YAML file that holds them, or to the working folder if they
come from the command line. Every error is one line with the file, the line, the key, what was found and expected.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from irdscale.config.schema import RunConfig, default_scope, result_settings
from irdscale.config.section import Section
from irdscale.errors import InputError
from irdscale.utils.suggestions import nearest


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _convert(node: yaml.Node, loader: _Loader, where: str, key: str, lines: dict[str, int]) -> Any:
    """Build plain values from YAML nodes and note the line of each key; keys given twice are errors."""
    lines[key] = node.start_mark.line + 1
    if isinstance(node, yaml.CollectionNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise InputError(f"found the tag {node.tag!r}", "a plain value", key, f"{where}:{lines[key]}")
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = str(loader.construct_object(key_node))
            dotted = f"{key}.{name}" if key else name
            if name in values:
                raise InputError("given twice", key=dotted, where=f"{where}:{key_node.start_mark.line + 1}")
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
        raise InputError(f"not YAML: {problem}", where=f"{where}{line}") from error
    except RecursionError:
        raise InputError("not YAML: a value that contains itself", where=where) from None


def _local(value: Any, folder: Path) -> Any:
    if isinstance(value, str) and (value.startswith(("./", "../", "~/")) or value in (".", "..")):
        return str((folder / Path(value).expanduser()).resolve())
    return value


_PATH_KEYS = (
    ("model", "path"),
    ("task", "dataset"),
    ("task", "chat_template"),
    ("task", "pool", "mixed_with", "dataset"),
    ("train", "deepspeed"),
)


def _path_keys(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The sections of `values` that hold a path, and the key of the path in them."""
    for *sections, key in _PATH_KEYS:
        inside: Any = values
        for section in sections:
            inside = inside.get(section) if isinstance(inside, dict) else None
        if isinstance(inside, dict) and key in inside:
            yield inside, key


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the explicit relative paths of `values` absolute, in place."""
    for section, key in _path_keys(values):
        section[key] = _local(section[key], folder)


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides (values are YAML), and check everything.

    Raises:
        InputError: the file is missing or not YAML, a key is unknown or given twice, a value has the wrong type or
            range, or two values contradict each other.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"cannot read the configuration: {reason}", where=path) from error
    values, lines = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError("found no sections", ", ".join(RunConfig.model_fields), where=path)
    _resolve_paths(values, path.parent)
    overridden = {_override(values, override) for override in overrides}
    config = _validate(values, str(path), lines, overridden)
    place = "command line" if any(key.startswith("compare.variants") for key in overridden) else str(path)
    for name, changed in config.compare.variants.items():
        changed_config(config, changed[1:], f"{place}: compare.variants.{name}")
    return config


def changed_config(config: RunConfig, overrides: list[str], where: str) -> RunConfig:
    """`config` with `section.key=value` overrides; error messages give `where` as their place.

    Raises:
        InputError: as `load_config`.
    """
    values = config.model_dump(mode="json")
    refuse_repeated(overrides, where)
    for override in overrides:
        _override(values, override)
    return _validate(values, where, {}, set())


def changes_of(overrides: list[str]) -> dict[str, Any]:
    """The values that `section.key=value` overrides set, as nested sections, unchecked.

    Raises:
        InputError: one of them is not key=value, or replaces an earlier one.
    """
    values: dict[str, Any] = {}
    refuse_repeated(overrides, "command line")
    for override in overrides:
        _override(values, override)
    return values


def refuse_repeated(overrides: Iterable[str], where: str) -> None:
    """Check that no `section.key=value` replaces an earlier one.

    Raises:
        InputError: one does.
    """
    earlier: list[str] = []
    for override in overrides:
        key = override.partition("=")[0]
        for before in earlier:
            if before == key:
                raise InputError("given twice", key=key, where=where)
            if before.startswith(f"{key}."):
                raise InputError(f"found after {before}=, which it replaces", f"{key}= first", key, where)
        earlier.append(key)


def _override(values: dict[str, Any], override: str) -> str:
    """Set what `section.key=value` says, in place; returns the key."""
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise InputError(f"found {override!r}", "key=value, such as search.ratio=0.01", where="command line")
    parsed, _ = _parse_yaml(raw, f"{key}={raw}")
    section = values
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {}
        section = section[parent]
    section[last] = parsed
    _resolve_paths(values, Path.cwd())
    return key


def check_config(values: dict[str, Any], where: str) -> RunConfig:
    """The configuration that a search dumped into the file `where`.

    Raises:
        InputError: this version does not know one of its keys or values.
    """
    return _validate(values, where, {}, set())


def _validate(values: dict[str, Any], where: str, lines: dict[str, int], overridden: set[str]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problem = _first([dict(problem) for problem in error.errors()])
        location = [str(part) for part in problem["loc"] if part not in _UNION_MEMBERS]
        fault = _fault(problem, location)
        key = ".".join([*location, fault.key] if fault.key else location)
        if any(f"{key}.".startswith(f"{changed}.") or f"{changed}.".startswith(f"{key}.") for changed in overridden):
            place = "command line"
        else:
            place = f"{where}:{lines[key]}" if key in lines else where
        raise InputError(fault.found, fault.expected, key, place) from None


# What pydantic adds to the location of an error inside `always_train`, which is a word or a list.
_UNION_MEMBERS = ("literal['auto']", "list[str]")


def _first(errors: list[dict[str, Any]]) -> dict[str, Any]:
    """The error to show: an unknown key before all others, since it often causes them."""
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        return unknown[0]
    # For a list, show what is wrong with an item, not that the list is not a word.
    items = [error for error in errors if len(error["loc"]) > 1 and error["loc"][-2] == "list[str]"]
    if items and "literal['auto']" in errors[0]["loc"]:
        return items[0]
    return errors[0]


def _fault(error: dict[str, Any], location: list[str]) -> InputError:
    """What was found and expected, for one pydantic error; a validator's key is relative to `location`."""
    value, kind = error.get("input"), error["type"]
    found = f"found {'nothing' if value is None else repr(value)}"
    if kind == "value_error":
        raised = error["ctx"]["error"]
        assert isinstance(raised, InputError)
        return raised
    if kind == "extra_forbidden":
        known = _fields_at(location[:-1])
        near = nearest(location[-1], known)
        return InputError(f"unknown key{near}", "" if near else f"one of {', '.join(known)}")
    if kind == "missing":
        section = _section_at(location)
        return InputError("missing", f"a section with {', '.join(_required(section))}" if section else "a value")
    if kind in ("model_type", "model_attributes_type"):
        return InputError(found, f"a section with keys such as {', '.join(_fields_at(location)[:3])}")
    if "literal['auto']" in error["loc"]:
        return InputError(found, "'auto' or a list of regular expressions")
    if kind in ("too_short", "too_long"):
        size = error["ctx"].get("min_length", error["ctx"].get("max_length"))
        items = "1 item" if size == 1 else f"{size} items"
        return InputError(found, f"at {'least' if kind == 'too_short' else 'most'} {items}")
    if kind == "list_type":
        return InputError(found, _as_list(value))
    if kind == "string_too_short":
        return InputError(found, "some text")
    if error["loc"] == ("model", "path") and value is None:
        return InputError(found, "a local folder, a hub id, a GGUF file or package:NAME/FOLDER")
    expected = str(error["msg"]).removeprefix("Input should be ")
    if kind == "literal_error":
        return InputError(found + nearest(value, re.findall(r"'([^']*)'", expected)), expected)
    return InputError(found, expected[0].lower() + expected[1:])


def _as_list(value: Any) -> str:
    """How to write a value that stands where a list is meant."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"a list: write [{value}]"
    if isinstance(value, str) and re.fullmatch(r"[^,]+(,[^,]+)+", value):
        return f"a list: write [{value}]"
    return "a list, in brackets"


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


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A dumped configuration without its input paths, which do not identify the files' contents."""
    found = copy.deepcopy(config)
    for section, key in _path_keys(found):
        del section[key]
    return found


def same_search(config: dict[str, Any]) -> dict[str, Any]:
    """What two dumped configurations must share to be the same search: all but where they run, read and write."""
    config = without_paths(config)
    fisher = config["fisher"] | {"scope": config["fisher"]["scope"] or default_scope(config["task"]["kind"])}
    search = {k: v for k, v in config["search"].items() if k not in ("runner", "ray")}
    kept = {k: v for k, v in config.items() if k not in ("output", "distributed", "compare")}
    return kept | {"fisher": fisher, "search": search, "train": result_settings(config["train"])}


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
    """section.key -> its value, for all that must be the same on every rank; paths may differ by node.

    Args:
        zero: the contents of `train.deepspeed`.
    """
    facts = config.model_dump(mode="json", exclude={"output"})
    for section, key in _path_keys(facts):
        del section[key]
    compared = {**dict(leaves(facts)), "train.deepspeed": zero}
    return {key: json.dumps(value, sort_keys=True) for key, value in compared.items()}


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key` and value of every leaf of nested sections, or lists of sections."""
    for key, inside in values.items():
        if isinstance(inside, list) and inside and isinstance(inside[0], dict):
            inside = {str(number): item for number, item in enumerate(inside)}
        if isinstance(inside, dict):
            yield from leaves(inside, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inside
