"""Propose a configuration for a user's data: the verb `init`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irdscale.cli.init_values import Values, first_values
from irdscale.cli.init_yaml import yaml_of
from irdscale.config.kinds import LANGUAGE_KINDS, METRICS
from irdscale.config.loader import changes_of, check_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.models.glance import Glance, glance
from irdscale.tasks.column_profiles import columns_of
from irdscale.tasks.delimiters import shown
from irdscale.tasks.first_look import Look, as_flow, left_out, look
from irdscale.tasks.glue import GLUE
from irdscale.utils.suggestions import nearest

# A plain template for models that have none: "user: ..", "assistant: ..", and the end-of-sequence token.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Rows that are tokenised to find their lengths, and how much longer others may be.
MEASURED, MARGIN = 2000, 1.25
# Largest max_length that is proposed: for texts with classes, for texts that are cut, and for all others.
LONGEST = {"sequence-classification": 512, "regression": 512, "causal-lm": 1024}
LONGEST_ANSWER = 4096
# Characters of a token, and tokens that a template adds, where there is no tokenizer.
CHARACTERS, ADDED = 3, 64
# Smallest max_length that follows from characters alone.
SAFE = 128
STAND_IN = "MODEL"
# Comment of a value that the user gives.
GIVEN = "as given"


@dataclass(frozen=True)
class _Draft:
    """A configuration so far: values with comments by `section.key`, what was assumed, and the look at the data."""

    values: Values
    assumed: list[str]
    look: Look
    kind: str

    def set(self, key: str, value: Any, comment: str = "", assumed: str = "") -> None:
        self.values[key] = value, comment
        if assumed:
            self.assumed.append(assumed)

    def config(self, **changes: Any) -> RunConfig:
        """The configuration, with a stand-in for a missing model.

        Raises:
            InputError: a value is invalid.
        """
        nested: dict[str, Any] = {}
        for dotted, (value, _) in {**self.values, **{key: (value, "") for key, value in changes.items()}}.items():
            section, _, key = dotted.partition(".")
            if key:
                nested.setdefault(section, {})[key] = value
            else:
                nested[section] = value
        nested["model"]["path"] = nested["model"]["path"] or STAND_IN
        return check_config(nested, "irdscale init")


def run_init(data: str, model: str | None, task: str | None, overrides: list[str], tell: bool = True) -> dict[str, Any]:
    """Look at a file or folder and write a configuration for it.

    Args:
        data: file, folder of splits, or glue/NAME.
        model: value for `model.path`; if None, the configuration lacks it, which the loader refuses.
        task: kind of task; if None, the data decide.
        overrides: `section.key=value`, which are taken as they are.
        tell: whether to print what was assumed on stderr.

    Returns:
        {"yaml": text of the configuration, "config": its values by `section.key`, "assumed": sentences}.

    Raises:
        InputError: there are no such data or model, the data do not fit the task or the model, or two uses of the data
            are as likely.
    """
    given = _checked_arguments(data, task, overrides)
    section = given.get("task", {})
    path = model or given.get("model", {}).get("path")
    seen = None if path is None else glance(path)
    found = look(data, task or section.get("kind"), section)
    kind = found.chosen.kind or GLUE[found.chosen.why].kind
    _check_model(seen, kind)
    draft = _Draft({}, [], found, kind)
    _set_model_and_data(draft, seen)
    _set_lengths(draft, seen, given)
    measured_rows = found.rows if found.splits == ("train",) else None
    values, assumed = first_values(kind, seen, _train_rows(found), measured_rows)
    draft.values.update({key: value for key, value in values.items() if key not in draft.values})
    draft.assumed.extend(assumed)
    draft.set("output", f"runs/{Path(data).expanduser().resolve().stem}", "folder for everything the run writes")
    _apply(draft, given)
    draft.config()
    if seen is not None and seen.has_tokenizer and Path(found.dataset).exists():
        _measure(draft, seen, given)
    title = f"{kind} with {data}, written by irdscale init."
    if tell:
        _tell(draft, data)
    config = {key: value for key, (value, _) in draft.values.items()}
    return {"yaml": yaml_of(draft.values, title, METRICS[kind]), "config": config, "assumed": draft.assumed}


def _checked_arguments(data: str, task: str | None, overrides: list[str]) -> dict[str, Any]:
    files = [override for override in overrides if "=" not in override]
    if files:
        raise InputError(f"found {files[0]!r}", "key=value" if data else f"--data {files[0]}", where="command line")
    if not data:
        raise InputError("missing", "--data FILE, a file or a folder of train, validation and test files", "--data")
    if task is not None and task not in METRICS:
        raise InputError(f"found {task!r}{nearest(task, METRICS)}", f"one of {', '.join(METRICS)}", "--task")
    given = changes_of(overrides)
    for name in given:
        if name not in RunConfig.model_fields:
            near = nearest(name, RunConfig.model_fields)
            raise InputError(f"unknown key{near}", f"one of {', '.join(RunConfig.model_fields)}", name, "command line")
        if name != "output" and not isinstance(given[name], dict):
            raise InputError(f"found {given[name]!r}", f"{name}.KEY=VALUE", name, "command line")
    if task is not None and given.get("task", {}).get("kind", task) != task:
        raise InputError(f"found {given['task']['kind']!r}", f"{task!r}, as --task says", "task.kind", "command line")
    return given


def _check_model(seen: Glance | None, kind: str) -> None:
    if seen is not None and kind in LANGUAGE_KINDS and seen.kind in ("encoder", "encoder-decoder"):
        fault = f"found an {seen.kind} ({seen.where}) for {kind}"
        raise InputError(fault, "a decoder, which continues texts", "--model")


def _set_model_and_data(draft: _Draft, seen: Glance | None) -> None:
    found, kind = draft.look, draft.kind
    if seen is None:
        needed = "a decoder" if kind in LANGUAGE_KINDS else "an encoder or a decoder"
        text = "fill in: a local folder, a hub id, a GGUF file or package:NAME/FOLDER"
        draft.set("model.path", None, text, f"model.path is empty: fill in {needed}, or give --model")
    else:
        draft.set("model.path", seen.where, "local folder, hub id, GGUF file or package:NAME/FOLDER")
        if seen.kind == "unknown":
            draft.assumed.append(f"the model {seen.where} was not looked at: it is not on this machine")
    draft.set("task.dataset", found.dataset, f"read: {', '.join(found.splits)}" if found.splits else "")
    if found.delimiter is not None:
        text = f"the columns are parted by {shown(found.delimiter)}"
        draft.set("task.delimiter", found.delimiter, text, text)
    if found.chosen.kind is not None:
        others = sorted({each.kind for each in found.passed if each.kind not in (None, kind)})
        instead = f"; --task {' or '.join(map(str, others))} instead" if others else ""
        draft.set("task.kind", kind, found.chosen.why, f"task.kind is {kind}: {found.chosen.why}{instead}")
        text = f"not read: {', '.join(left_out(found))}" if left_out(found) else "all columns are read"
        said = f"task.columns is {as_flow(found.chosen.columns)}; {text}"
        draft.set("task.columns", found.chosen.columns, text, said)
    keys = set(found.chosen.columns)
    if (
        seen is not None
        and seen.has_tokenizer
        and not seen.has_chat_template
        and keys & {"messages", "system", "instruction"}
    ):
        text = "the model has no template of its own: a plain one"
        draft.set("task.chat_template", TEMPLATE, text, f"task.chat_template: {text}")


def _train_rows(found: Look) -> int | None:
    """Rows that are trained on: the splits that are missing take tenths of train."""
    if found.rows is None:
        return None
    missing = 0 if {"validation"} & set(found.splits) else 1 if "test" in found.splits else 2
    rows = found.rows - missing * (found.rows // 10)
    if rows < 16:
        raise InputError(f"found {found.rows} rows", "20 or more, better a hundred", "--data", found.dataset)
    return rows


def _set_lengths(draft: _Draft, seen: Glance | None, given: dict[str, Any]) -> None:
    """Set `task.max_length` from the characters of the texts; `_measure` replaces it where there is a tokenizer."""
    if "max_length" in given.get("task", {}):
        return
    if draft.look.table is None:
        draft.set("task.max_length", 256 if GLUE[draft.look.chosen.why].name in ("rte", "qnli", "mnli") else 128)
        return
    used = set(draft.look.table.column_names) - set(left_out(draft.look))
    columns = [column for column in columns_of(draft.look.table) if column.name in used]
    sizes = [0] * max(len(column.values) for column in columns)
    for column in columns:
        for row, value in enumerate(column.values):
            sizes[row] += len(str(value))
    tokens = sorted(size // CHARACTERS + (ADDED if column.is_chat else 8) for size in sizes)
    _choose_length(draft, seen, tokens[-1] * 5 // 4, tokens[len(tokens) * 95 // 100], "estimated from characters", SAFE)


def _choose_length(draft: _Draft, seen: Glance | None, longest: int, p95: int, how: str, least: int = 32) -> None:
    kind = draft.kind
    most = LONGEST.get(kind, LONGEST_ANSWER)
    if seen is not None and seen.positions is not None:
        most = min(most, seen.positions if seen.positions % 32 == 0 else seen.positions // 32 * 32 or seen.positions)
    wanted = longest if kind not in LONGEST or longest <= 128 else max(128, p95)
    step = 32 if wanted <= 512 else 128
    length = min(most, max(least, -(-wanted // step) * step))
    cut = {"causal-lm": "cut in pieces", "sft": "cut from the left", "multiple-choice": "cut from the left"}
    what = "tokens; none is longer" if longest <= length else f"tokens; longer ones are {cut.get(kind, 'cut')}"
    draft.set("task.max_length", length, what)
    draft.assumed[:] = [text for text in draft.assumed if not text.startswith(("task.max_length", "task.truncate"))]
    draft.assumed.append(f"task.max_length is {length}: the longest text has about {longest} tokens ({how})")
    if draft.values.get("task.truncate", (None, ""))[1] != GIVEN:
        draft.values.pop("task.truncate", None)
    if kind not in LONGEST and longest > length:
        text = "rows that are too long lose the beginning of their prompts; unset, they are refused"
        draft.set("task.truncate", "left", text, f"task.truncate is left: {text}")


def _measure(draft: _Draft, seen: Glance, given: dict[str, Any]) -> None:
    """Tokenise rows as training does: set `task.max_length` from their lengths, and tell of refused rows.

    Raises:
        InputError: the data do not fit the task or the model.
    """
    from irdscale.tasks.preview import run_data

    rows = draft.look.rows or 0
    limit = {"train": MEASURED} if (_train_rows(draft.look) or 0) > MEASURED else {}
    if limit and draft.look.splits == ("train",):
        limit |= dict.fromkeys(("selection", "test"), min(MEASURED, rows) // 10)
    config = draft.config(
        **{"task.max_length": 10**6, "task.limit": limit, "fisher.samples": 1, "search.min_samples": 1}
    )
    found = run_data(config)
    parts = found["splits"].values()
    all_read = not limit
    longest = max(split["tokens"]["longest"] for split in parts)
    p95 = max(split["tokens"]["p95"] for split in parts)
    how = "measured" if all_read else f"measured on {sum(split['samples'] for split in parts):,} samples, with a margin"
    if "max_length" not in given.get("task", {}):
        _choose_length(draft, seen, longest if all_read else round(longest * MARGIN), p95, how)
    refused = found["refused"]
    if refused["rows"]:
        draft.assumed.append(
            f"{refused['rows']} row(s) would be refused: remove them first; {refused['first'][0]['why']}"
        )


def _apply(draft: _Draft, given: dict[str, Any]) -> None:
    """Set what the user gives; one of steps and epochs replaces the other."""
    for section, inside in given.items():
        if section == "output":
            draft.set("output", inside, GIVEN)
            continue
        for key, value in inside.items():
            dotted = f"{section}.{key}"
            before = draft.values.get(dotted, (None, ""))[0]
            if dotted in ("task.columns", "task.kind", "model.path") and before is not None:
                continue
            if dotted == "task.delimiter" and before == value:
                continue
            merged = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
            draft.set(dotted, merged, GIVEN)
            other = {"train.steps": "train.epochs", "train.epochs": "train.steps"}.get(dotted)
            if other is not None and other.partition(".")[2] not in inside:
                draft.values.pop(other, None)


def _tell(draft: _Draft, data: str) -> None:
    """Print what was read and assumed, on stderr."""
    found = draft.look
    if found.table is not None:
        held = ", ".join(column.in_words() for column in columns_of(found.table))
        print(f"Read {found.rows:,} rows of {data}: {held}.", file=sys.stderr)
    for text in draft.assumed:
        print(f"Assumed: {text}.", file=sys.stderr)
    print("Next, with the file's name: irdscale data my.yaml; irdscale search my.yaml", file=sys.stderr)
