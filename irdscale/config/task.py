"""The section `task` of a configuration: the data set, its columns, its splits and its population."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from irdscale.config.kinds import COLUMNS, KNOWN_METRICS, METRICS, Kind
from irdscale.config.section import Section
from irdscale.errors import InputError
from irdscale.utils.suggestions import nearest


class ColumnsConfig(Section):
    text: list[str] | None = Field(
        None, min_length=1, max_length=2, description="Text column, or two for pairs of texts."
    )
    label: str | None = Field(
        None, description="Label column: class numbers, class names, a number (regression) or the right choice."
    )
    prompt: str | None = Field(None, description="Column of the text before a completion or a choice.")
    completion: str | None = Field(None, description="Column of the answer that the model learns for a prompt.")
    messages: str | None = Field(
        None, description="Column of chats: lists of {role, content}, or of {from, value} (ShareGPT)."
    )
    tools: str | None = Field(None, description="Column of the functions that a chat's assistant may call, as JSON.")
    system: str | None = Field(None, description="Column of system prompts, which make chats of prompt and completion.")
    instruction: str | None = Field(None, description="Column of questions of chats (Alpaca).")
    input: str | None = Field(None, description="Column of texts that stand behind the instruction; may hold nothing.")
    output: str | None = Field(None, description="Column of answers to the instructions (Alpaca).")
    choices: list[str] | None = Field(None, min_length=1, description="Column of lists, or one for each choice.")
    choice_labels: str | list[str] | None = Field(
        None,
        min_length=1,
        description="Names that `label` uses for the choices, where it does not count from 0: a column of lists, a "
        "field of one (choices.label by default), or a column for each choice.",
    )

    def named(self) -> dict[str, list[str]]:
        """Key -> the columns that it names, for the keys that are set."""
        given = self.model_dump(exclude_none=True)
        return {key: [value] if isinstance(value, str) else value for key, value in given.items()}


class LimitConfig(Section):
    train: int | None = Field(None, ge=1, description="Number of train samples that are kept, drawn with `split_seed`.")
    selection: int | None = Field(None, ge=1, description="Number of selection samples that are kept.")
    test: int | None = Field(None, ge=1, description="Number of test samples that are kept.")


Share = Annotated[float, Field(gt=0, lt=1)]


class LabelSkewConfig(Section):
    label: int | str = Field(description="Number or name of a class.")
    share: Share = Field(description="Share of this class in the population.")

    @field_validator("label", mode="before")
    @classmethod
    def _number_or_name(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise InputError(f"found {value!r}", "the number or the name of a class")
        return value


class LengthSkewConfig(Section):
    keep: Literal["shortest", "longest"] = Field(description="Quarter of the train split, by length in tokens.")
    share: Share = Field(description="Share of this quarter in the population; the rest comes from the other quarters.")


class CopiesConfig(Section):
    of: int = Field(ge=1, description="Number of copied samples of the train split: those with the fewest tokens.")
    share: Share = Field(
        description="Share of the added copies in the population, spread evenly over the copied samples."
    )


def check_delimiter(value: str | None) -> str | None:
    """Return the delimiter of a CSV file, or raise `InputError` where it is not one character."""
    value = "\t" if value in ("\\t", "tab") else value
    if value is not None and (len(value) != 1 or not value.isascii() or value.isalnum() or value in '"\r\n'):
        raise InputError(f"found {value!r}", "one character, such as ';', or tab")
    return value


Delimiter = Annotated[str | None, AfterValidator(check_delimiter)]


class MixedWithConfig(Section):
    dataset: str = Field(
        min_length=1, description="Second data set, as `task.dataset`, with samples of the same kind and classes."
    )
    subset: str | None = Field(None, description="Subset of the second data set, as `task.subset`.")
    delimiter: Delimiter = Field(None, description="Delimiter of the second data set, as `task.delimiter`.")
    columns: ColumnsConfig | None = Field(
        None, description="Columns of the second data set; `task.columns` if unset (GLUE tasks have their own)."
    )
    share: Share = Field(description="Share of the second data set in the population.")


class PoolConfig(Section):
    """One change to the population, which has as many samples as the train split (and the second data set) allow."""

    label_skew: LabelSkewConfig | None = Field(None, description="Population of mostly one class (classification).")
    length_skew: LengthSkewConfig | None = Field(None, description="Population of mostly short or mostly long samples.")
    copies: CopiesConfig | None = Field(None, description="Population of the train split and copies of short samples.")
    mixed_with: MixedWithConfig | None = Field(None, description="Population mixed with samples of another data set.")
    label_noise: Share | None = Field(
        None,
        description="Share of the train split with a false label: another class, or another sample's number.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> PoolConfig:
        given = [name for name in PoolConfig.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            fault = f"found {' and '.join(given) or 'none'}"
            raise InputError(fault, f"one of {', '.join(PoolConfig.model_fields)}")
        return self


def check_pool(kind: Kind, pool: PoolConfig, section: str = "pool") -> None:
    """Check that a way to shape the population fits samples of this kind.

    Args:
        section: key of `pool`, for the error.

    Raises:
        InputError: it does not.
    """
    labelled = {"label_skew": ("sequence-classification",), "label_noise": ("sequence-classification", "regression")}
    for name, kinds in labelled.items():
        if getattr(pool, name) is not None and kind not in kinds:
            expected = f"kind {' or '.join(map(repr, kinds))}"
            raise InputError(f"found with kind {kind!r}", expected, f"{section}.{name}")
    if pool.mixed_with is not None and pool.mixed_with.columns is not None:
        check_columns(kind, pool.mixed_with.columns, f"{section}.mixed_with.columns")


class TaskConfig(Section):
    dataset: str = Field(
        min_length=1,
        description="GLUE task (`glue/NAME`), hub id, or local file or folder of parquet, JSONL, JSON or CSV files.",
    )
    kind: Kind | None = Field(None, description="Kind of task; required except for GLUE tasks.")
    subset: str | None = Field(None, description="Configuration of a hub data set, or folder inside a local one.")
    delimiter: Delimiter = Field(
        None, description="Delimiter of CSV files: one character; a comma if unset, in .tsv files a tab."
    )
    columns: ColumnsConfig | None = Field(None, description="Columns of the data set; required except for GLUE tasks.")
    metric: str | None = Field(None, description=f"Metric: {', '.join(KNOWN_METRICS)}; the task's own if unset.")
    max_length: int = Field(
        128, ge=4, description="Tokens of a sample; longer ones are truncated, cut in pieces (causal-lm) or refused."
    )
    truncate: Literal["left"] | None = Field(
        None, description="Side from which long prompts are cut (sft, multiple-choice); they are refused if unset."
    )
    chat_template: str | None = Field(
        None, min_length=1, description="Chat template (Jinja), as text or a file; the tokenizer's own if unset."
    )
    train_on: Literal["last"] | None = Field(
        None, description="Answers of a chat that are learned: the last one alone (last); all of them if unset."
    )
    packing: bool = Field(
        False, description="Packed training of causal-lm: texts joined to max_length; Fisher samples stay single texts."
    )
    max_new_tokens: int = Field(256, ge=1, description="Largest number of tokens generated for exact_match.")
    limit: LimitConfig = Field(default_factory=lambda: LimitConfig())
    split_seed: int = Field(0, ge=0, description="Seed of every split and draw of samples.")
    pool: PoolConfig | None = Field(
        None,
        description="Change to the samples that masks are computed from; all other data stay as they are.",
    )

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, value: str | None) -> str | None:
        if value is not None and value not in KNOWN_METRICS:
            near = nearest(value, KNOWN_METRICS)
            raise InputError(f"found {value!r}{near}", f"one of {', '.join(KNOWN_METRICS)}")
        return value

    @model_validator(mode="after")
    def _fits_kind(self) -> TaskConfig:
        if self.kind is not None:
            check_kind(self, self.kind)
        return self


def check_kind(task: TaskConfig, kind: Kind, section: str = "") -> None:
    """Check that the other keys of a task fit samples of this kind.

    Args:
        section: prefix of each key in an error, such as `task.`.

    Raises:
        InputError: they do not.
    """
    metrics, with_kind = METRICS[kind], f"with kind {kind!r}"
    if task.metric is not None and task.metric not in metrics:
        raise InputError(f"found {task.metric!r} {with_kind}", f"one of {', '.join(metrics)}", f"{section}metric")
    if task.packing and kind != "causal-lm":
        raise InputError(f"found true {with_kind}", "false (only causal-lm packs)", f"{section}packing")
    if task.truncate is not None and kind not in ("sft", "multiple-choice"):
        raise InputError(f"found {task.truncate!r} {with_kind}", "none", f"{section}truncate")
    if task.columns is not None:
        check_columns(kind, task.columns, f"{section}columns")
    for key in ("chat_template", "train_on"):
        if getattr(task, key) is not None and not may_read_chats(kind, task.columns):
            raise InputError("found without chats", "kind 'sft' with columns of chats", f"{section}{key}")
    if task.pool is not None:
        check_pool(kind, task.pool, f"{section}pool")


def may_read_chats(kind: Kind, columns: ColumnsConfig | None) -> bool:
    """Whether samples of this kind, and of these columns where they are given, are chats, which a template writes."""
    chats = ("messages", "system", "instruction")
    return kind == "sft" and (columns is None or any(key in columns.named() for key in chats))


def check_columns(kind: Kind, columns: ColumnsConfig, section: str = "columns") -> None:
    """Check that these columns make samples of this kind.

    Args:
        section: key of `columns`, for the error.

    Raises:
        InputError: they do not.
    """
    found, ways = set(columns.named()), COLUMNS[kind]
    expected = ", or ".join(" and ".join(way) for way in ways)
    for way in ways:
        if found == set(way):
            break
    else:
        best = max(ways, key=lambda way: len(found & set(way)))
        for key in (*best, *found):
            if key in best and key not in found:
                raise InputError("missing", f"{expected}, for kind {kind!r}", f"{section}.{key}")
            if key not in best:
                raise InputError(f"found with kind {kind!r}", expected, f"{section}.{key}")
    if kind == "causal-lm" and len(columns.text or ()) != 1:
        raise InputError(f"found {columns.text}", "1 column, for kind 'causal-lm'", f"{section}.text")
