"""The benchmark's rows, with small models in the place of its own; figures are not tested."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from irdscale import bench
from irdscale.errors import InputError
from tests.models import config_of


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_model(name: str) -> Any:
        torch.manual_seed(0)
        config = config_of(name, vocab_size=30_000, max_position_embeddings=128)
        return transformers.AutoModelForSequenceClassification.from_config(config).eval()

    monkeypatch.setattr(bench, "make_model", make_model)
    monkeypatch.setattr(bench, "REPEATS", 2)


@pytest.mark.usefixtures("_small")
def test_rows() -> None:
    result = bench.run_bench("all", progress=False)
    assert len(result["rows"]) == 2 * 2 * 3 + 2 * 3
    for row in result["rows"]:
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row["met"] is None or row["met"] == eval(f"{row['ratio']} {row['bar']}")
        assert len(row["seconds"]) == 2
    assert {row["part"] for row in result["rows"]} == {"fisher", "train"}
    assert {row["tokens"] for row in result["rows"]} == {32, 128}


def test_repeats_are_interleaved() -> None:
    calls: list[str] = []
    seconds = bench.side_by_side({n: lambda n=n: calls.append(n) for n in "abc"}, repeats=3)  # type: ignore[misc]
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {n: len(s) for n, s in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_unknown_part() -> None:
    with pytest.raises(InputError, match="bench: found 'ray'; expected one of fisher, train, all"):
        bench.run_bench("ray", progress=False)
