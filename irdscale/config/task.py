"""The section `task` of a configuration: the data set, its columns, its splits and its population."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

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
    messages: str | None = Field(None, description="Column of chats: lists of {role, content}.")
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


class MixedWithConfig(Section):
    dataset: str = Field(
        min_length=1, description="Second data set, as `task.dataset`, with samples of the same kind and classes."
    )
    subset: str | None = Field(None, description="Subset of the second data set, as `task.subset`.")
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
        description="GLUE task (`glue/NAME`), hub id, or local file or folder of parquet, JSONL or CSV files.",
    )
    kind: Kind | None = Field(None, description="Kind of task; required except for GLUE tasks.")
    subset: str | None = Field(None, description="Configuration of a hub data set, or folder inside a local one.")
    columns: ColumnsConfig | None = Field(None, description="Columns of the data set; required except for GLUE tasks.")
    metric: str | None = Field(None, description=f"Metric: {', '.join(KNOWN_METRICS)}; the task's own if unset.")
    max_length: int = Field(
        128, ge=4, description="Tokens of a sample; longer ones are truncated, cut in pieces (causal-lm) or refused."
    )
    truncate: Literal["left"] | None = Field(
        None, description="Side from which long prompts are cut (sft, multiple-choice); they are refused if unset."
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
        if self.kind is None:
            return self
        metrics, with_kind = METRICS[self.kind], f"with kind {self.kind!r}"
        if self.metric is not None and self.metric not in metrics:
            raise InputError(f"found {self.metric!r} {with_kind}", f"one of {', '.join(metrics)}", "metric")
        if self.packing and self.kind != "causal-lm":
            raise InputError(f"found true {with_kind}", "false (only causal-lm packs)", "packing")
        if self.truncate is not None and self.kind not in ("sft", "multiple-choice"):
            raise InputError(f"found {self.truncate!r} {with_kind}", "none", "truncate")
        if self.columns is not None:
            check_columns(self.kind, self.columns)
        if self.pool is not None:
            check_pool(self.kind, self.pool)
        return self


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
