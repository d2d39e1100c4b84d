"""A task: three splits of tokenised samples, their batches, and the metrics of a model's output."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset

from irdscale.config.kinds import LANGUAGE_KINDS, LOWER_IS_BETTER, METRICS, Kind
from irdscale.config.schema import RunConfig
from irdscale.config.task import LimitConfig
from irdscale.errors import InputError
from irdscale.models.build import load_model_config, load_tokenizer, trained_head
from irdscale.models.classes import HeadClasses, are_placeholders, listed, order_of, other_classes, places_of
from irdscale.tasks.chat_templates import with_chat_template
from irdscale.tasks.counts import Cut, cut_of
from irdscale.tasks.data import Split, read_rows, read_splits
from irdscale.tasks.labels import are_names, class_labels, is_unlabelled, regression_labels
from irdscale.tasks.language import language_samples, packed
from irdscale.tasks.metrics import compute, fitting_metrics, load_metric
from irdscale.tasks.metrics.errors import standard_errors
from irdscale.tasks.population import shaped_pool
from irdscale.tasks.refused import Refused, accepted
from irdscale.tasks.sources import Source, find_source
from irdscale.tasks.splits import PARTS, Part, assign, draw
from irdscale.tasks.tokens import encode, pad_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """The samples that a model learns from, and the metrics that score it.

    Attributes:
        train, selection, test: samples with `input_ids`, `attention_mask`, `token_type_ids` where the model uses them,
            `labels`, and `row`, the 0-based row of the source split; for language models the columns of
            `irdscale.tasks.language`. A search reads train and selection only.
        origin: source of each of the three splits, for messages.
        label_names: classes in the order of the model's outputs, which is the data's or a trained head's.
        metric: main metric of `metrics`; larger is better, unless `lower_is_better`.
        blocks: packed texts, which are trained on instead of `train`.
        max_new_tokens: largest number of tokens of a generated answer.
        pool: population by `task.pool` (see `irdscale.tasks.population`).
        pool_in_words: description of `pool`.
        class_order: class numbers in the order of the metrics, if it differs from that of `label_names`.
        cut: number of train samples that are longer than `task.max_length`.
    """

    name: str
    kind: Kind
    train: Dataset
    selection: Dataset
    test: Dataset
    origin: dict[str, str]
    num_labels: int
    label_names: list[str]
    metric: str
    metrics: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    blocks: Dataset | None = None
    max_new_tokens: int = 0
    pool: Dataset | None = None
    pool_in_words: str | None = None
    class_order: tuple[int, ...] | None = None
    cut: Cut | None = None

    @property
    def lower_is_better(self) -> bool:
        """Whether smaller values of the main metric are better."""
        return self.metric in LOWER_IS_BETTER

    @property
    def is_language(self) -> bool:
        """Whether samples are texts that a language model continues."""
        return self.kind in LANGUAGE_KINDS

    @property
    def trained(self) -> Dataset:
        """The samples to train on: those of the train split, or the blocks that they were packed into."""
        return self.train if self.blocks is None else self.blocks

    @property
    def longest(self) -> int:
        """Tokens of the longest sample among those to train on and the selection split."""
        tables = (split.with_format("arrow")[:] for split in (self.trained, self.selection))
        return max(int(pc.max(pc.list_value_length(table["input_ids"])).as_py()) for table in tables)

    @property
    def population(self) -> Dataset:
        """The samples that masks are computed from: the train split, or `pool`."""
        return self.train if self.pool is None else self.pool

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad samples to the longest: token tensors [B, T], labels [B] or [B, T]; drops other columns.

        Texts with a class or value are padded on the tokenizer's side, which is the right unless the model needs the
        left (see `irdscale.tasks.build_model`).
        """
        side = "right" if self.is_language else self.tokenizer.padding_side
        return pad_batch(samples, self.tokenizer.pad_token_id, side)

    def compute_metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Every metric of `metrics`, from logits [N, num_labels] (or [N] for regression) and labels [N].

        Raises:
            TrainingError: a logit is NaN or infinite.
        """
        return compute(self.metrics, self.kind, self.num_labels, *self._in_metric_order(logits, labels))

    def standard_errors(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The standard error of every metric over draws of samples; see `compute_metrics`."""
        return standard_errors(self.metrics, self.kind, self.num_labels, *self._in_metric_order(logits, labels))

    def _in_metric_order(self, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits and labels with the classes in the order of the metrics: F1 scores the second of two classes."""
        if self.class_order is None:
            return logits, labels
        order_C = np.asarray(self.class_order)
        return np.asarray(logits)[:, order_C], np.argsort(order_C)[np.asarray(labels)]


def load_task(config: RunConfig, head: HeadClasses | None = None, refused: Refused | None = None) -> Task:
    """Load, check, split and tokenise the data of `config.task` with the tokenizer of `config.model`.

    Classes are numbered as in the data or, with a trained head, as in the head, matched by name.

    Args:
        head: trained head of an adapter; if None, the checkpoint's own head counts, if it has a trained one.
        refused: list that gets the rows without a sample, which are left out; if None, the first one is an error.

    Raises:
        InputError: the data set, its columns, labels or size, or the model's tokenizer do not fit the configuration,
            or the classes are not those of the trained head.
    """
    source = find_source(config.task)
    if head is not None and head.kind is not None and _family(head.kind) != _family(source.kind):
        raise InputError(f"found {source.kind!r}", f"{head.kind!r}, the kind of {head.where}", "task.kind")
    if source.kind in LANGUAGE_KINDS:
        return _language_task(config, source, refused)
    return _labelled_task(config, source, head, refused)


def _family(kind: str) -> tuple[bool, bool]:
    """What two kinds of task must share to use one head."""
    return kind in LANGUAGE_KINDS, kind == "regression"


def _labelled_task(config: RunConfig, source: Source, head: HeadClasses | None, refused: Refused | None) -> Task:
    """A classification or regression task; see `load_task`."""
    regression = source.kind == "regression"
    valid = METRICS[source.kind]
    metrics = fitting_metrics(source.kind, config.task.metric, source.glue.metrics if source.glue else valid, valid)
    model_config = load_model_config(config.model)
    tokenizer = load_tokenizer(config.model)
    splits = read_splits(source)
    # Benchmarks do not publish the labels of their test split.
    if "test" in splits and (splits["test"].labels is None or is_unlabelled(splits["test"].labels)):
        del splits["test"]
    assert source.columns.label is not None
    data_names, labels = _numbers(
        splits, source.columns.label, regression, source.glue.label_names if source.glue else None
    )
    label_names, order = data_names, None
    if not regression:
        known = head or trained_head(config.model, model_config)
        if known is not None and known.names:
            label_names, order = _in_order_of(known, data_names, splits["train"], source, own=head is None)
    if order is not None:
        labels = {name: order[numbers] for name, numbers in labels.items()}
    parts = _parts(labels, not regression, config)
    if regression:
        _check_values(parts, labels, splits)
    for metric in metrics:
        load_metric(metric)
    # Models without segments would refuse token_type_ids, or, like GPT-2, embed them as words.
    segments = getattr(model_config, "type_vocab_size", 0) > 1
    cut: dict[str, list[int]] = {name: [] for name in parts}

    def made(name: str, part: Part) -> Dataset:
        split, length = splits[part.split], config.task.max_length
        return encode(tokenizer, split.texts, labels[part.split], part, length, segments, split.where, cut[name])

    encoded = {name: accepted(name, part, partial(made, name), refused) for name, part in parts.items()}
    pool, pool_in_words = shaped_pool(config, source.kind, encoded["train"], tokenizer, data_names, order, segments)
    return Task(
        name=source.name,
        kind=source.kind,
        **encoded,
        origin={name: part.origin for name, part in parts.items()},
        num_labels=1 if regression else len(label_names),
        label_names=label_names,
        metric=metrics[0],
        metrics=metrics,
        tokenizer=tokenizer,
        pool=pool,
        pool_in_words=pool_in_words,
        class_order=_counted(head, data_names, label_names, splits["train"], source),
        cut=cut_of(source.kind, config.task, cut["train"], encoded["train"]),
    )


def _language_task(config: RunConfig, source: Source, refused: Refused | None) -> Task:
    reported = tuple(name for name in METRICS[source.kind] if name != "exact_match")
    metrics = fitting_metrics(source.kind, config.task.metric, reported, METRICS[source.kind])
    tokenizer = with_chat_template(load_tokenizer(config.model), config.task.chat_template)
    splits = read_rows(source)
    label = source.columns.label
    if label is not None and "test" in splits:
        # Benchmarks do not publish the answers of their test split.
        table = splits["test"].table
        if label not in table.column_names or is_unlabelled(table.column(label).to_pylist()):
            del splits["test"]
    parts = _parts({name: np.zeros(split.table.num_rows) for name, split in splits.items()}, False, config)

    cut: dict[str, list[int]] = {name: [] for name in parts}

    def made(name: str, part: Part) -> Dataset:
        rows = splits[part.split]
        return language_samples(source.kind, tokenizer, rows, part, config.task, source.columns, cut[name])

    samples = {name: accepted(name, part, partial(made, name), refused) for name, part in parts.items()}
    if "exact_match" in metrics:
        for name in PARTS[1:]:
            _check_prompts(samples[name], splits[parts[name].split].where, source.columns.prompt is not None)
    pool, pool_in_words = shaped_pool(config, source.kind, samples["train"], tokenizer)
    if pool is None and config.fisher.samples > len(samples["train"]):
        raise _too_many_samples(config, len(samples["train"]), "the samples", parts["train"])
    return Task(
        name=source.name,
        kind=source.kind,
        **samples,
        origin={name: part.origin for name, part in parts.items()},
        num_labels=0,
        label_names=[],
        metric=metrics[0],
        metrics=metrics,
        tokenizer=tokenizer,
        blocks=packed(samples["train"], config.task.max_length) if config.task.packing else None,
        max_new_tokens=config.task.max_new_tokens,
        pool=pool,
        pool_in_words=pool_in_words,
        cut=cut_of(source.kind, config.task, cut["train"], samples["train"]),
    )


def _too_many_samples(config: RunConfig, most: int, of: str, part: Part) -> InputError:
    expected = f"at most {most}, {of} of the train split ({part.origin})"
    return InputError(f"found {config.fisher.samples}", expected, "fisher.samples")


def _check_values(parts: dict[str, Part], labels: dict[str, np.ndarray], splits: dict[str, Split]) -> None:
    """Check that the splits to measure on have two or more values each, as a correlation needs."""
    for name in PARTS[1:]:
        part = parts[name]
        if len(np.unique(labels[part.split][part.rows])) < 2:
            fault, expected = f"the {name} split's labels are all equal", "two or more values, for a correlation"
            raise InputError(fault, expected, "task.dataset", splits[part.split].where)


def _check_prompts(samples: Dataset, where: str, columns: bool) -> None:
    """Check that every prompt has a token to generate from; `columns`: prompts have a column of their own."""
    for row, prompt in zip(samples["row"], samples["prompt_length"], strict=True):
        if prompt == 0:
            key = f"task.columns.{'prompt' if columns else 'messages'}"
            expected = "some text, to generate an answer for exact_match"
            raise InputError("found a prompt without tokens", expected, key, f"{where}, row {row}")


def _numbers(
    splits: dict[str, Split], column: str, regression: bool, known: tuple[str, ...] | None
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The classes in the data's order, and each split's labels."""
    where = {name: _where(split, column) for name, split in splits.items()}
    values = {name: split.labels or [] for name, split in splits.items()}
    if regression:
        return [], {name: regression_labels(values[name], where[name]) for name in splits}
    declared = {name: split.label_names for name, split in splits.items()}
    names = declared["train"]
    # Metrics need GLUE's own order; a folder with that name may hold another task.
    if known and (names is None or order_of(names, known) is not None):
        names = list(known)
    numbers, names = class_labels(values, where, names, declared)
    return names, numbers


def _where(split: Split, column: str | None) -> str:
    return f"{split.where}: column {column!r}"


def _is_alphabetical(train: Split, source: Source) -> bool:
    """Whether the data set has class names but no order of its own, so that the names were sorted."""
    return source.glue is None and train.label_names is None and are_names(train.labels or [])


def _in_order_of(
    head: HeadClasses, names: list[str], train: Split, source: Source, own: bool
) -> tuple[list[str], np.ndarray | None]:
    """The classes in the order of a trained head, and the head's number of each class of the data; None if equal.

    Args:
        own: whether the head is the checkpoint's own, which training may still adapt to other classes.
    """
    order, where = order_of(names, head.names), f"task.columns.label: {_where(train, source.columns.label)}"
    alphabetical = _is_alphabetical(train, source)
    by_name = order is not None and places_of(names, head.names) is not None
    if order is None or (alphabetical and not by_name and not own):
        raise other_classes(names, head, where)
    if alphabetical and not by_name:
        log.warning(
            "%s: %s has no class names; the classes %s are assumed, in this order", where, head.where, listed(names)
        )
    found = list(names)
    if are_placeholders(names) and len(names) == len(head.names):
        found = list(head.names)
    else:
        for name, place in zip(names, order, strict=True):
            found[place] = name
    return found, None if order == list(range(len(order))) else np.asarray(order)


def _counted(
    head: HeadClasses | None, data_names: list[str], label_names: list[str], train: Split, source: Source
) -> tuple[int, ...] | None:
    """Class numbers in the order of the metrics: GLUE's, or else that of an adapter's training, or else the data's."""
    order = None if _is_alphabetical(train, source) else order_of(data_names, label_names)
    if head is not None and head.counted and source.glue is None:
        order = order_of(head.counted, label_names)
    return None if order is None or order == list(range(len(order))) else tuple(order)


def _parts(labels: dict[str, np.ndarray], stratify: bool, config: RunConfig) -> dict[str, Part]:
    seed, limit = config.task.split_seed, config.task.limit
    parts = assign(labels, stratify, seed)
    for name in LimitConfig.model_fields:
        size, wanted = len(parts[name].rows), getattr(limit, name)
        if size == 0:
            raise InputError(f"the {name} split ({parts[name].origin}) is empty", "more rows", "task.dataset")
        if wanted is not None and wanted > size:
            expected = f"at most {size}, the size of the {name} split ({parts[name].origin})"
            raise InputError(f"found {wanted}", expected, f"task.limit.{name}")
        if wanted is not None and wanted < size:
            parts[name] = draw(parts[name], wanted, seed)
    size = len(parts["train"].rows)
    # The population by `task.pool` may be larger than the train split.
    if config.task.pool is None and config.fisher.samples > size:
        raise _too_many_samples(config, size, "the size", parts["train"])
    return parts
