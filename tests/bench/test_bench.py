"""The benchmark's rows, with small models in the place of its own; figures are not tested."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import transformers

from irdscale import bench
from irdscale.bench import fisher, models, timing, train, trainer
from irdscale.errors import InputError
from tests.tiny_models import config_of


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_model(name: str) -> Any:
        torch.manual_seed(0)
        longest = {"n_positions" if name == "gpt2" else "max_position_embeddings": 128}
        config = config_of(name, vocab_size=30_000, **longest)
        return transformers.AutoModelForSequenceClassification.from_config(config).eval()

    for module in (fisher, models, train):
        monkeypatch.setattr(module, "make_model", make_model)
    for module in (fisher, train):
        monkeypatch.setattr(module, "REPEATS", 2)
    monkeypatch.setattr(trainer, "REPEATS", 2)
    monkeypatch.setattr(trainer, "STEPS", 2)
    monkeypatch.setattr(fisher, "TOPK_ENTRIES", 10_000)
    monkeypatch.setattr(fisher, "TOPK_K", 100)
    # Its processes would start with the real models.
    monkeypatch.setattr(fisher, "_ranks", list)
    monkeypatch.setattr(train, "bench_zero", list)
    # Whole searches; see test_search.
    monkeypatch.setattr(bench, "bench_search", lambda advance: [])


@pytest.mark.usefixtures("_small")
def test_rows() -> None:
    result = bench.run_bench("all", progress=False)
    others = 1 + (importlib.util.find_spec("kronfluence") is not None)
    assert len(result["rows"]) == 3 * 2 * 3 + others + 2 * 8 + 1
    for row in result["rows"]:
        counted = row["what"].endswith(" k")
        assert counted or row["low"] > 0
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["met"] is None or row["met"] == eval(f"{row['ratio']} {row['bar']}")
        assert len(row["seconds"]) == (0 if counted else 2)
    assert {row["part"] for row in result["rows"]} == {"fisher", "train"}
    assert {row["tokens"] for row in result["rows"]} == {32, 128, 0}


def test_repeats_are_interleaved() -> None:
    calls: list[str] = []
    seconds = timing.side_by_side({n: lambda n=n: calls.append(n) for n in "abc"}, repeats=3)  # type: ignore[misc]
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {n: len(s) for n, s in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_bar_is_judged_by_what_is_shown() -> None:
    assert timing.figure("train", "x", "bert", 8, 1.1004, limit=1.1)["met"]
    assert not timing.figure("train", "x", "bert", 8, 1.1006, limit=1.1)["met"]
    assert timing.figure("train", "x", "bert", 8, 0.7496, at_least=0.75)["met"]


def test_unknown_part() -> None:
    with pytest.raises(InputError, match="bench: found 'ray'; expected one of fisher, train, search, gpu, all"):
        bench.run_bench("ray", progress=False)
