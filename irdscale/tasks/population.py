"""The population that mask samples are drawn from, if `task.pool` makes it other than the train split.

It has the columns of the train split, which stays as it is, and `altered`: whether a sample is from the other data set,
an added copy, or has a false label. `row` of a sample from the other data set is its row there. Every draw depends on
`task.split_seed` and the data only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from irdscale.config.kinds import LANGUAGE_KINDS, Kind
from irdscale.config.schema import RunConfig
from irdscale.config.task import CopiesConfig, LabelSkewConfig, LengthSkewConfig, MixedWithConfig, TaskConfig
from irdscale.errors import InputError
from irdscale.models.classes import order_of
from irdscale.tasks.data import Split, read_rows, read_splits
from irdscale.tasks.labels import class_labels, regression_labels
from irdscale.tasks.language import language_samples
from irdscale.tasks.sources import Source, errors_of_mixed_with, mixed_source
from irdscale.tasks.splits import Part
from irdscale.tasks.tokens import encode
from irdscale.utils.formats import percent
from irdscale.utils.suggestions import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The samples, which of them are altered, and a description.
_Shaped = tuple[pa.Table, np.ndarray, str]


def shaped_pool(
    config: RunConfig,
    kind: Kind,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str] = (),
    class_order: np.ndarray | None = None,
    segments: bool = False,
) -> tuple[Dataset | None, str | None]:
    """The population by `task.pool` and its description; None and None if `task.pool` is unset.

    Args:
        train: encoded train split.
        label_names: classes, in the data's order.
        class_order: number in `train` of each of these classes, if it differs.
        segments: whether samples have `token_type_ids`.

    Raises:
        InputError: `task.pool` names something that is missing or does not fit, or leaves fewer than `fisher.samples`.
    """
    pool = config.task.pool
    if pool is None:
        return None, None
    table = train.with_format("arrow")[:].replace_schema_metadata(None)
    generator = random.Random(f"population/{config.task.split_seed}")
    if pool.label_skew is not None:
        shaped = _label_skew(pool.label_skew, table, label_names, class_order, generator)
    elif pool.length_skew is not None:
        shaped = _length_skew(pool.length_skew, table, generator)
    elif pool.copies is not None:
        shaped = _copies(pool.copies, table)
    elif pool.mixed_with is not None:
        with errors_of_mixed_with():
            name, other = _other_train(
                config.task, pool.mixed_with, kind, tokenizer, label_names, class_order, segments
            )
        shaped = _mixed(pool.mixed_with.share, table, name, other, generator)
    else:
        assert pool.label_noise is not None
        shaped = _label_noise(pool.label_noise, table, len(label_names), generator)
    samples, altered, words = shaped
    if config.fisher.samples > samples.num_rows:
        expected = f"at most {samples.num_rows}, the population that task.pool leaves: {words}"
        raise InputError(f"found {config.fisher.samples}", expected, "fisher.samples")
    return Dataset(samples.append_column("altered", pa.array(altered))), words


def _describe(share: float, of: str, count: int, size: int) -> str:
    return f"{percent(share, 4)} {of} ({count:,} of {size:,} samples)"


def _most(share: float, first: int, second: int) -> tuple[int, int]:
    """The largest numbers of samples from two groups of which the first is `share` of the sum."""
    size = int(min((first + 1) / share, (second + 1) / (1 - share))) + 1
    while round(share * size) > first or size - round(share * size) > second:
        size -= 1
    return round(share * size), size - round(share * size)


def _skewed(table: pa.Table, favoured_N: np.ndarray, share: float, of: str, generator: random.Random) -> _Shaped:
    """Draw samples of `table` so that `share` of them are favoured."""
    groups = np.flatnonzero(favoured_N).tolist(), np.flatnonzero(~favoured_N).tolist()
    count, rest = _most(share, *map(len, groups))
    places = sorted(generator.sample(groups[0], count) + generator.sample(groups[1], rest))
    words = _describe(share, of, count, len(places))
    return table.take(pa.array(places, pa.int64())), np.zeros(len(places), bool), words


def _label_skew(
    skew: LabelSkewConfig,
    table: pa.Table,
    label_names: Sequence[str],
    class_order: np.ndarray | None,
    generator: random.Random,
) -> _Shaped:
    label, last = skew.label, len(label_names) - 1
    known = label in label_names if isinstance(label, str) else 0 <= label <= last
    if not known:
        close = nearest(label, label_names) if isinstance(label, str) else ""
        expected = f"a class by its name or number, 0 to {last}"
        raise InputError(f"found {label!r}{close}", expected, "task.pool.label_skew.label")
    number = label_names.index(label) if isinstance(label, str) else label
    favoured_N = table["labels"].to_numpy() == (number if class_order is None else class_order[number])
    return _skewed(table, favoured_N, skew.share, f"of class {label_names[number]}", generator)


def _lengths(table: pa.Table) -> np.ndarray:
    """Number of tokens of each sample."""
    return pc.list_value_length(table["input_ids"]).to_numpy()


def _length_skew(skew: LengthSkewConfig, table: pa.Table, generator: random.Random) -> _Shaped:
    lengths_N = _lengths(table)
    order = np.argsort(lengths_N if skew.keep == "shortest" else -lengths_N, kind="stable")
    favoured_N = np.zeros(len(order), bool)
    favoured_N[order[: len(order) // 4]] = True
    return _skewed(table, favoured_N, skew.share, f"of the {skew.keep} quarter of the train split", generator)


def _copies(copies: CopiesConfig, table: pa.Table) -> _Shaped:
    size = table.num_rows
    if copies.of > size:
        raise InputError(f"found {copies.of}", f"at most {size}, the size of the train split", "task.pool.copies.of")
    shortest = np.argsort(_lengths(table), kind="stable")[: copies.of]
    count = round(size * copies.share / (1 - copies.share))
    samples = pa.concat_tables([table, table.take(pa.array(np.resize(shortest, count)))])
    words = _describe(copies.share, f"copies of the {copies.of:,} shortest samples", count, size + count)
    return samples, np.arange(size + count) >= size, words


def _mixed(share: float, table: pa.Table, name: str, other: Dataset, generator: random.Random) -> _Shaped:
    count, rest = _most(share, len(other), table.num_rows)
    foreign = other.with_format("arrow")[:].replace_schema_metadata(None).select(table.column_names)
    drawn = [
        rows.take(pa.array(sorted(generator.sample(range(rows.num_rows), wanted)), pa.int64()))
        for rows, wanted in ((table, rest), (foreign, count))
    ]
    return (
        pa.concat_tables(drawn),
        np.arange(rest + count) >= rest,
        _describe(share, f"from {name}", count, rest + count),
    )


def _label_noise(share: float, table: pa.Table, classes: int, generator: random.Random) -> _Shaped:
    """Give some samples a false label: another class at random, or, without classes, another sample's number."""
    labels_N = table["labels"].to_numpy().copy()
    size, ordered = len(labels_N), np.sort(labels_N)
    places = generator.sample(range(size), round(share * size))
    for place in places:
        label = labels_N[place]
        if classes:
            labels_N[place] = (label + generator.randrange(1, classes)) % classes
            continue
        first, behind = np.searchsorted(ordered, label), np.searchsorted(ordered, label, "right")
        if behind - first == size:
            fault = f"found {label} in all of the train split"
            raise InputError(fault, "two numbers or more", "task.pool.label_noise")
        drawn = generator.randrange(size - (behind - first))
        labels_N[place] = ordered[drawn if drawn < first else drawn + behind - first]
    altered_N = np.zeros(size, bool)
    altered_N[places] = True
    column = table.column_names.index("labels")
    noisy = table.set_column(column, "labels", pa.array(labels_N, table.schema.field(column).type))
    return noisy, altered_N, _describe(share, "with a false label", len(places), size)


def _other_train(
    task: TaskConfig,
    mixed: MixedWithConfig,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    class_order: np.ndarray | None,
    segments: bool,
) -> tuple[str, Dataset]:
    """The name of the other data set, and its complete train split as samples of this task."""
    source = mixed_source(task, mixed, kind)
    if kind in LANGUAGE_KINDS:
        rows = read_rows(source)["train"]
        part = Part("train", np.arange(rows.table.num_rows), "train")
        return source.name, language_samples(kind, tokenizer, rows, part, task, source.columns)
    split = read_splits(source)["train"]
    labels_N = _labels(split, source, label_names)
    if class_order is not None:
        labels_N = class_order[labels_N]
    part = Part("train", np.arange(len(labels_N)), "train")
    return source.name, encode(tokenizer, split.texts, labels_N, part, task.max_length, segments, split.where)


def _labels(split: Split, source: Source, label_names: Sequence[str]) -> np.ndarray:
    """The other data set's labels as class numbers of the task, matched by name if both have class names."""
    labels: list[Any] = split.labels or []
    where = f"{split.where}: column {source.columns.label!r}"
    if source.kind == "regression":
        return regression_labels(labels, where)
    declared = split.label_names
    if source.glue and (declared is None or order_of(declared, source.glue.label_names) is None):
        declared = list(source.glue.label_names)
    if declared is not None and order_of(declared, label_names) is None:
        fault, expected = f"found the classes {', '.join(declared)}", f"the task's, {', '.join(label_names)}"
        raise InputError(fault, expected, "task.columns.label", where)
    return class_labels({"train": labels}, {"train": where}, label_names, {"train": declared})[0]["train"]
