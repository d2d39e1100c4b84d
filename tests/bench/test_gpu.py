"""The GPU's benchmark: its refusal, and its Fisher passes on a small model and the CPU; figures are not tested."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from irdscale.bench import gpu as bench_gpu
from irdscale.errors import InputError

SMALL = bench_gpu.Size(hidden=32, mlp=48, layers=2, heads=4, key_value_heads=2, vocabulary=30_000)


def test_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^bench: found no CUDA device; expected one to measure the GPU's part on$"):
        bench_gpu.run_gpu_bench()


@pytest.fixture
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DEVICE": "cpu",
        "SAMPLES": 4,
        "PASS_TOKENS": (8,),
        "PASS_REPEATS": 2,
    }.items():
        monkeypatch.setattr(bench_gpu, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("_on_the_cpu")
def test_pass_rows_with_the_largest_batches_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    make_model = bench_gpu._make_model

    def tight(size: bench_gpu.Size) -> Any:
        def full(_module: Any, _args: Any, kwargs: Any) -> None:
            if len(kwargs["input_ids"]) > 2:
                raise torch.OutOfMemoryError

        model = make_model(size)
        model.register_forward_pre_hook(full, with_kwargs=True)
        return model

    monkeypatch.setattr(bench_gpu, "_make_model", tight)
    (row,) = bench_gpu._pass_rows("small", SMALL)
    assert (row["part"], row["model"], row["tokens"], row["bar"]) == ("fisher", "small", 8, ">= 20.0")
    assert row["what"] == "one-sample loop (FISH) / Fisher pass, batches of 2"
    assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert row["met"] == (row["ratio"] >= 20)


@pytest.mark.usefixtures("_on_the_cpu")
def test_no_memory_is_no_row(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_gpu, "_make_model", full)
    assert bench_gpu._pass_rows("8B-like", SMALL) == []
    assert "8B-like does not fit the GPU" in caplog.text


@pytest.mark.usefixtures("_on_the_cpu")
def test_kernel_rows_need_the_kernel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(bench_gpu, "TOKENS", 8)
    assert bench_gpu._kernel_rows("small", SMALL) == []
    assert "the Triton kernel does not run here for torch.bfloat16" in caplog.text

    monkeypatch.setattr(bench_gpu.kernels, "usable", lambda *_: True)
    monkeypatch.setattr(bench_gpu.kernels, "add_squared_products", lambda *_: None)
    monkeypatch.setattr(bench_gpu, "CALLS", 2)
    rows = bench_gpu._kernel_rows("small", SMALL)
    assert len(rows) == 3 * 2 * 2
    assert [row["bar"] for row in rows] == [">= 0.8", "", "", ""] * 3


@pytest.mark.usefixtures("_on_the_cpu")
def test_sparse_rows(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(bench_gpu, "TOKENS", 8)
    monkeypatch.setattr(bench_gpu, "CALLS", 2)
    assert bench_gpu._sparse_rows("small", SMALL) == []
    assert "the Triton kernel for sparse gradients does not run here" in caplog.text

    monkeypatch.setattr(bench_gpu.sparse_kernels, "usable", lambda *_: True)
    monkeypatch.setattr(bench_gpu.sparse_kernels, "tile_entries", lambda *_: None)
    rows = bench_gpu._sparse_rows("small", SMALL)
    assert len(rows) == 3 * 2
    assert {row["part"] for row in rows} == {"train"}
    assert bench_gpu._draw_entries(32, 48, 1 / 8).max() < 4 * 48
