"""Texts to tokens, and samples to padded batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from irdscale.errors import InputError
from irdscale.models.chunked_losses import IGNORED
from irdscale.tasks.splits import Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[list[str]],
    labels: np.ndarray,
    part: Part,
    max_length: int,
    segments: bool,
    where: str,
    cut: list[int] | None = None,
) -> datasets.Dataset:
    """Tokenise the rows of `part`, truncated to `max_length` tokens, not padded, in memory.

    Tokenizers that put nothing between the two texts of a pair (GPT-2) get the end-of-sequence token there.

    Args:
        texts: one or two columns, each with every row of the source split.
        labels: [rows of the source split].
        segments: keep `token_type_ids`.
        where: the source split's file, for messages.
        cut: gets the rows that are truncated.

    Returns:
        Columns `input_ids`, `attention_mask`, `token_type_ids` (if `segments`), `labels`, `row` (of the source split).

    Raises:
        InputError: a text has no token.
    """
    first, second = texts[0], texts[1] if len(texts) == 2 else None
    joint = ""
    if second is not None and tokenizer.num_special_tokens_to_add(True) == tokenizer.num_special_tokens_to_add(False):
        joint = tokenizer.eos_token or ""
    columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": []}
    if segments:
        columns["token_type_ids"] = []
    for start in range(0, len(part.rows), BATCH):
        rows = part.rows[start : start + BATCH]
        pair = None if second is None else [joint + second[row] for row in rows]
        batch = tokenizer(
            [first[row] for row in rows],
            pair,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_token_type_ids=segments,
            return_attention_mask=True,
        )
        for name, values in columns.items():
            values += batch[name]
        if cut is not None:
            for place, (row, tokens) in enumerate(zip(rows, batch["input_ids"], strict=True)):
                if len(tokens) >= max_length and _is_cut(tokenizer, batch, place, first[row], pair, max_length):
                    cut.append(int(row))
    for row, tokens in zip(part.rows, columns["input_ids"]):
        if not tokens:
            raise InputError("found a text without tokens", "some text", "task.columns.text", f"{where}, row {row}")
    kinds = {"input_ids": pa.int32(), "attention_mask": pa.int8(), "token_type_ids": pa.int8()}
    arrays = {name: pa.array(values, pa.list_(kinds[name])) for name, values in columns.items()}
    table = pa.table({**arrays, "labels": pa.array(labels[part.rows]), "row": pa.array(part.rows)})
    return datasets.Dataset(table)


def _is_cut(
    tokenizer: PreTrainedTokenizerBase, batch: Any, place: int, text: str, pair: list[str] | None, max_length: int
) -> bool:
    """Whether a text of a batch was truncated, which its length alone does not tell."""
    if batch.encodings:
        return bool(batch.encodings[place].overflowing)
    whole = tokenizer(text, None if pair is None else pair[place], verbose=False)
    return len(whole["input_ids"]) > max_length


def labelled(tokens: list[int], prompt: int) -> list[int]:
    """Labels of the tokens after the first `prompt`; the first token has none, since nothing predicts it."""
    begin = max(1, prompt)
    return [IGNORED] * begin + tokens[begin:]


def pad_batch(samples: list[dict[str, Any]], pad_token_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Pad samples to the longest: token tensors [B, T] (int64), `labels` [B] (int64 or float32) or [B, T] (int64).

    Args:
        side: side of the padding.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    batch: dict[str, torch.Tensor] = {}
    for name, filler in (
        ("input_ids", pad_token_id),
        ("attention_mask", 0),
        ("token_type_ids", 0),
        ("labels", IGNORED),
    ):
        if name == "attention_mask":
            rows = [[1] * length for length in lengths]
        elif name not in samples[0] or not hasattr(samples[0][name], "__len__"):
            continue
        else:
            rows = [sample[name] for sample in samples]
        padded = torch.full((len(samples), max(lengths)), filler)
        for index, row in enumerate(rows):
            start = max(lengths) - len(row) if side == "left" else 0
            padded[index, start : start + len(row)] = torch.as_tensor(row)
        batch[name] = padded
    if "labels" in samples[0] and "labels" not in batch:
        labels = [sample["labels"] for sample in samples]
        batch["labels"] = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)
    return batch
