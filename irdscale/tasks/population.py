"""The population, shaped by `task.pool` so that it is not i.i.d.: what samples for masks are drawn from.

It has the columns of the train split, which stays as it is, and `altered`: whether a sample is of the other data set,
an additional copy, or has a false label. `row` of a sample of the other data set is its row there. Every draw is a
function of `task.split_seed` and of the data alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from irdscale.tasks.data import Source, Split, find_source, read_rows, read_splits
from irdscale.tasks.labels import class_labels, regression_labels
from irdscale.tasks.language import language_samples
from irdscale.tasks.splits import Part
from irdscale.tasks.tokens import encode
from irdscale.utils.suggestions import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The samples, which of them are altered, and in words what they are.
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
    """The population that `task.pool` asks for, and what it is in words; None and None where it asks for none.

    Args:
        train: the encoded train split.
        label_names: the classes, in the data's order.
        class_order: the number in `train` of each of these classes, where that is another.
        segments: whether samples have `token_type_ids`.

    Raises:
        InputError: what `task.pool` names is not there or does not fit, or fewer than `fisher.samples` are left.
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
        with _keys_of_the_other():
            name, other = _other_train(
                config.task, pool.mixed_with, kind, tokenizer, label_names, class_order, segments
            )
        shaped = _mixed(pool.mixed_with.share, table, name, other, generator)
    else:
        assert pool.label_noise is not None
        shaped = _label_noise(pool.label_noise, table, len(label_names), generator)
    samples, altered, words = shaped
    if config.fisher.samples > samples.num_rows:
        raise InputError(
            f"fisher.samples: found {config.fisher.samples}; expected at most {samples.num_rows}, the population that "
            f"task.pool leaves: {words}"
        )
    return Dataset(samples.append_column("altered", pa.array(altered))), words


def _in_words(share: float, of: str, count: int, size: int) -> str:
    return f"{100 * share:g} % {of} ({count:,} of {size:,} samples)"


def _most(share: float, first: int, second: int) -> tuple[int, int]:
    """How many to take of two groups of samples, so that the first makes up `share` of as many as there can be."""
    size = int(min((first + 1) / share, (second + 1) / (1 - share))) + 1
    while round(share * size) > first or size - round(share * size) > second:
        size -= 1
    return round(share * size), size - round(share * size)


def _skewed(table: pa.Table, favoured_N: np.ndarray, share: float, of: str, generator: random.Random) -> _Shaped:
    """Samples of `table`, of which `share` is favoured."""
    groups = np.flatnonzero(favoured_N).tolist(), np.flatnonzero(~favoured_N).tolist()
    count, rest = _most(share, *map(len, groups))
    places = sorted(generator.sample(groups[0], count) + generator.sample(groups[1], rest))
    words = _in_words(share, of, count, len(places))
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
        raise InputError(
            f"task.pool.label_skew.label: found {label!r}{close}; expected a class by its name or number, 0 to {last}"
        )
    number = label_names.index(label) if isinstance(label, str) else label
    favoured_N = table["labels"].to_numpy() == (number if class_order is None else class_order[number])
    return _skewed(table, favoured_N, skew.share, f"of class {label_names[number]}", generator)


def _lengths(table: pa.Table) -> np.ndarray:
    """Tokens of each sample."""
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
        raise InputError(
            f"task.pool.copies.of: found {copies.of}; expected at most {size}, the size of the train split"
        )
    shortest = np.argsort(_lengths(table), kind="stable")[: copies.of]
    count = round(size * copies.share / (1 - copies.share))
    samples = pa.concat_tables([table, table.take(pa.array(np.resize(shortest, count)))])
    words = _in_words(copies.share, f"copies of the {copies.of:,} shortest samples", count, size + count)
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
        _in_words(share, f"from {name}", count, rest + count),
    )


def _label_noise(share: float, table: pa.Table, classes: int, generator: random.Random) -> _Shaped:
    """False labels: another class, each as likely; or, where there are no classes, another sample's other number."""
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
            raise InputError(
                f"task.pool.label_noise: found {label} in all of the train split; expected two numbers or more"
            )
        drawn = generator.randrange(size - (behind - first))
        labels_N[place] = ordered[drawn if drawn < first else drawn + behind - first]
    altered_N = np.zeros(size, bool)
    altered_N[places] = True
    column = table.column_names.index("labels")
    noisy = table.set_column(column, "labels", pa.array(labels_N, table.schema.field(column).type))
    return noisy, altered_N, _in_words(share, "with a false label", len(places), size)


@contextmanager
def _keys_of_the_other() -> Iterator[None]:
    """Name a key of `task.pool.mixed_with` where reading data names one of `task`."""
    try:
        yield
    except InputError as error:
        message = re.sub(r"^task\.(?=dataset|subset|columns)", "task.pool.mixed_with.", str(error))
        if not message.startswith("task.pool."):
            message = f"task.pool.mixed_with: {message}"
        raise InputError(message) from error


def _other_train(
    task: TaskConfig,
    mixed: MixedWithConfig,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    class_order: np.ndarray | None,
    segments: bool,
) -> tuple[str, Dataset]:
    """The name of the other data set, and its whole train split as samples of this task."""
    place = {"dataset": mixed.dataset, "subset": mixed.subset, "columns": mixed.columns or task.columns}
    task = task.model_copy(update={**place, "kind": kind, "pool": None})
    source = find_source(task)
    if source.glue is not None and mixed.columns is None:
        # GLUE tasks have columns of their own.
        source = find_source(task.model_copy(update={"columns": None}))
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
    """The other data set's labels, as numbers of the task's classes, by name where both name theirs."""
    labels: list[Any] = split.labels or []
    where = f"task.columns.label: {split.where}: column {source.columns.label!r}"
    if source.kind == "regression":
        return regression_labels(labels, where)
    declared = split.label_names
    if source.glue and (declared is None or order_of(declared, source.glue.label_names) is None):
        declared = list(source.glue.label_names)
    if declared is not None and order_of(declared, label_names) is None:
        raise InputError(
            f"{where}: found the classes {', '.join(declared)}; expected the task's, {', '.join(label_names)}"
        )
    return class_labels({"train": labels}, {"train": where}, label_names, {"train": declared})[0]["train"]
