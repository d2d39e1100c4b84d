"""The texts of a search's samples, read from the data again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.config.loader import check_config
from irdscale.errors import InputError, RunError

if TYPE_CHECKING:
    from irdscale.config.schema import RunConfig
    from irdscale.tasks import Task

# Largest number of characters shown of a text.
CUT = 200


@dataclass(frozen=True)
class Texts:
    """The texts of some samples, or why they are not known.

    Attributes:
        of: place in the pool -> text, cut.
        label_names: names of the classes, by number.
        missing: sentence on why there are no texts; None if there are.
    """

    of: Mapping[int, str] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)
    missing: str | None = None


def read_texts(result: Mapping[str, Any], traces: Mapping[str, Any], places: Iterable[int], output: Path) -> Texts:
    """The texts of a search's samples at these places of its pool.

    Loads the data and the tokenizer, no weights.

    Args:
        result: contents of result.json.
        traces: contents of traces.json.
        output: folder of the search, for messages.
    """
    try:
        config = check_config(result["config"], str(output / "result.json"))
    except InputError as error:
        return Texts(missing=_missing(error))
    return texts_of(config, traces, places)


def texts_of(config: RunConfig, traces: Mapping[str, Any], places: Iterable[int]) -> Texts:
    """The texts of the samples that a search with this configuration draws; see `read_texts`."""
    from irdscale.fisher.pool import draw_samples
    from irdscale.tasks import load_task
    from irdscale.tasks.preview import without_warnings

    try:
        with without_warnings():
            task = load_task(config)
        pool = draw_samples(config, task, min(config.fisher.samples, len(task.population)), "pool")
        if list(task.population.select(pool)["row"]) != traces.get("row"):
            raise InputError("found other samples than the search", "the same", "task.dataset", config.task.dataset)
    except (InputError, RunError) as error:
        return Texts(missing=_missing(error))
    places = sorted(set(places))
    tokens = task.population.select([pool[place] for place in places])["input_ids"]
    texts = (_decoded(task, ids) for ids in tokens)
    return Texts({place: cut(text) for place, text in zip(places, texts, strict=True)}, task.label_names)


def _decoded(task: Task, ids: Sequence[int]) -> str:
    """The text of a sample's tokens, without special tokens other than that of unknown characters."""
    tokenizer = task.tokenizer
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    # Tokens of words have lost the spaces of the text; those of language models have kept them.
    clean = not task.is_language
    return str(tokenizer.decode([i for i in ids if i not in special], clean_up_tokenization_spaces=clean))


def with_texts(listed: Iterable[Mapping[str, Any]], texts: Texts) -> list[dict[str, Any]]:
    """The samples that a table lists, with their texts (None if unknown) and the names of their classes."""
    return [
        {**one, "text": texts.of.get(one["place"]), "label": class_name(texts.label_names, one["label"])}
        for one in listed
    ]


def class_name(names: Sequence[str], label: object) -> object:
    """The name of a class by its number; other labels as they are."""
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else label


def label_word(kind: str) -> str:
    """What the label of a sample is called."""
    return "target tokens" if kind in LANGUAGE_KINDS else "class" if kind == "sequence-classification" else "label"


def cut(text: str) -> str:
    """The text in one line, of at most `CUT` characters."""
    line = " ".join(text.split())
    return line if len(line) <= CUT else line[: CUT - 1].rstrip() + "…"


def _missing(error: Exception) -> str:
    return f"The texts of the samples are not shown: {error}."
