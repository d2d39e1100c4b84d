"""Tokenising and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from irdscale.errors import InputError
from irdscale.tasks.splits import Part
from irdscale.tasks.tokens import encode, pad_batch
from tests.helpers import tiny_tokenizer

PAIRS = [["he is", "a man", "bad"], ["good film", "not", "it"]]


def encoded(tokenizer: Any, texts: list[list[str]], rows: list[int] | None = None, **options: Any) -> Any:
    rows = list(range(len(texts[0]))) if rows is None else rows
    labels = np.arange(len(texts[0]))
    values = {"max_length": 32, "segments": False, "where": "a.csv", **options}
    return encode(tokenizer, texts, labels, Part("train", np.array(rows), "train"), **values)


def test_pairs_with_segments_equal_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    data = encoded(tokenizer, PAIRS, segments=True)
    assert data.column_names == ["input_ids", "attention_mask", "token_type_ids", "labels", "row"]
    expected = tokenizer(*PAIRS, return_token_type_ids=True)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert data[name][:] == expected[name]
    assert tokenizer.convert_ids_to_tokens(data[0]["input_ids"]) == [
        "[CLS]",
        "he",
        "is",
        "[SEP]",
        "good",
        "film",
        "[SEP]",
    ]
    assert max(data[0]["token_type_ids"]) == 1


def test_rows_are_picked_with_their_labels_and_nothing_is_cached(tmp_path: Path) -> None:
    data = encoded(tiny_tokenizer(tmp_path), PAIRS[:1], rows=[0, 2])
    assert data["row"][:] == [0, 2]
    assert data["labels"][:] == [0, 2]
    assert "token_type_ids" not in data.column_names
    assert data.cache_files == []


def test_truncation(tmp_path: Path) -> None:
    data = encoded(tiny_tokenizer(tmp_path), [["a " * 50, "a"]], max_length=8)
    assert [len(tokens) for tokens in data["input_ids"]] == [8, 3]


def test_a_tokenizer_without_separator_gets_the_end_token_between_a_pair(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "gpt2", "gpt2")
    tokens = tokenizer.convert_ids_to_tokens(encoded(tokenizer, PAIRS)[0]["input_ids"])
    assert tokens == ["he", "is", "<|endoftext|>", "good", "film"]
    assert tokenizer.convert_ids_to_tokens(encoded(tokenizer, PAIRS[:1])[0]["input_ids"]) == ["he", "is"]
    llama = tiny_tokenizer(tmp_path / "llama", "llama")
    tokens = llama.convert_ids_to_tokens(encoded(llama, PAIRS)[0]["input_ids"])
    assert tokens == ["<s>", "he", "is", "<s>", "good", "film"]


def test_a_text_without_tokens_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, "gpt2")
    with pytest.raises(InputError, match=r"a\.csv, row 2: task\.columns\.text: found a text without tokens"):
        encoded(tokenizer, [["a", "", " "]], rows=[0, 2])


def test_more_rows_than_one_batch_keep_their_order(tmp_path: Path) -> None:
    texts = [str(number) for number in range(2001)]
    tokenizer = tiny_tokenizer(tmp_path)
    data = encoded(tokenizer, [texts])
    assert data[1999]["input_ids"] == tokenizer("1999").input_ids
    assert data["row"][:] == list(range(2001))


def test_padding_goes_right_and_row_is_dropped() -> None:
    samples = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "token_type_ids": [0, 0, 1], "labels": 1, "row": 9},
        {"input_ids": [8], "attention_mask": [1], "token_type_ids": [0], "labels": 0, "row": 3},
    ]
    batch = pad_batch(samples, pad_token_id=2)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_regression_labels_are_floats() -> None:
    batch = pad_batch([{"input_ids": [1], "attention_mask": [1], "labels": 2.0}], 0)
    assert batch["labels"].dtype == torch.float32
