"""The search's rows: the work of a naive search counted by hand, and the rest on a toy."""

from __future__ import annotations

from pathlib import Path

import pytest

from irdscale.bench import search
from irdscale.errors import InputError
from irdscale.search.ird import Pair
from tests.search.toy import write_config


def test_what_a_naive_search_does() -> None:
    path = [Pair(64, 100), Pair(32, 100), Pair(32, 50)]
    # The start: 64. Round 1: ranks 64 twice, takes 32, 64, 32. Round 2: ranks 32 twice, takes 16, 32, 16.
    assert search.naive_gradients(path, Pair(1, 1)) == 64 + 128 + 128 + 64 + 64
    # Samples are not halved below their minimum, so the parameters alone are.
    assert search.naive_gradients(path, Pair(33, 1)) == 64 + 64 + 32
    assert search.naive_gradients(path[:1], Pair(1, 1)) == 64


def test_without_the_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(search, "CONFIG", tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"found no .*none\.yaml"):
        search.bench_search(lambda: None)


@pytest.mark.slow
def test_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs ray[tune]")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(search, "CONFIG", write_config(tmp_path))
    monkeypatch.setattr(search, "REPEATS", 1)
    rows = search.bench_search(lambda: None)
    assert len(rows) == 3
    for row in rows:
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["met"] is None or row["met"] == eval(f"{row['ratio']} {row['bar']}")
