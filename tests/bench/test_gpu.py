"""The GPU's benchmark with small models on the CPU: every row, what is left out, what fails; figures are not tested."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from irdscale import bench
from irdscale.bench import gpu, gpu_fisher, gpu_language, gpu_models, gpu_products, gpu_steps, gpu_trainer
from irdscale.bench.gpu_models import SIZES, Size
from irdscale.bench.timing import figure
from irdscale.errors import InputError, RunError
from irdscale.models.quantized import quantized_linears
from irdscale.utils.quantized import dequantized
from tests.quantized import needs_bitsandbytes

SMALL = Size(hidden=32, mlp=48, layers=2, heads=4, batch=2, key_value_heads=2, vocabulary=64)


def test_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^bench: found no CUDA device; expected one to measure the GPU's part on$"):
        bench.run_bench("gpu", progress=False)


@pytest.mark.parametrize("there", [False, True])
def test_all_has_the_part_of_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    for part in ("fisher", "train", "search"):
        monkeypatch.setattr(bench, f"bench_{part}", lambda advance: [])
    monkeypatch.setattr(bench, "run_gpu_bench", lambda advance: ([{"part": "fisher"}], ["compiling: RunError: no"]))
    result = bench.run_bench("all", progress=False)
    assert len(result["rows"]) == len(result["failed"]) == int(there)
    assert result["device"] == ("a GPU" if there else None)


@pytest.fixture
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = dict(SIZES)
    SIZES.clear()
    SIZES.update(small=SMALL, larger=SMALL)
    monkeypatch.setattr(gpu_models, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_models, "TOKENS", 8)
    for module in (gpu_fisher, gpu_language, gpu_products, gpu_steps, gpu_trainer):
        monkeypatch.setattr(module, "REPEATS", 2)
    monkeypatch.setattr(gpu_products, "CALLS", 2)
    monkeypatch.setattr(gpu_fisher, "SAMPLES", 4)
    # Collecting garbage takes half a second in a process of tests.
    monkeypatch.setattr(gpu_steps, "free", lambda: None)
    yield
    SIZES.clear()
    SIZES.update(real)


def sound(rows: list[dict[str, Any]]) -> list[str]:
    """What was measured, of rows that agree with themselves."""
    for row in rows:
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["met"] is None or row["met"] == eval(f"{row['ratio']} {row['bar']}")
    return [row["what"] for row in rows]


@pytest.mark.usefixtures("_on_the_cpu")
def test_fisher_rows() -> None:
    rows = list(gpu_fisher.fisher_rows("small"))
    assert [row["bar"] for row in rows] == ["<= 1.15", "<= 3.0", "<= 20.0", ""]
    assert sound(rows)[0] == "Fisher pass of 4 samples / forward + backward, batches of 2"


@pytest.mark.usefixtures("_on_the_cpu")
def test_the_plain_pass_takes_the_gradients_of_what_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[set[str]] = []

    def see(measured: Any, repeats: int) -> Any:
        model = next(cell.cell_contents for cell in measured["plain"].__closure__ if callable(cell.cell_contents))
        taken.append(set(measured))
        model()
        return {name: [1.0, 1.0, 1.0] for name in measured}

    made: list[Any] = []
    make_model = gpu_models.make_model
    monkeypatch.setattr(gpu_fisher, "make_model", lambda size: made.append(make_model(size)) or made[-1])
    gradients: set[str] = set()
    zero_grad = torch.nn.Module.zero_grad

    def note(model: Any, set_to_none: bool = True) -> None:
        gradients.update(name for name, p in model.named_parameters() if p.grad is not None)
        zero_grad(model, set_to_none)

    monkeypatch.setattr(torch.nn.Module, "zero_grad", note)
    monkeypatch.setattr(gpu_fisher, "side_by_side", see)
    next(gpu_fisher.fisher_rows("small"))
    assert taken == [{"fisher", "plain"}]
    assert gradients == {name for name, p in made[0].named_parameters() if name.endswith("_proj.weight")}


@pytest.mark.usefixtures("_on_the_cpu")
def test_step_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(gpu_steps, "planned_peak", lambda name, kind: 2 * gpu_steps.GIB)
    monkeypatch.setattr(gpu_steps, "peak_of", lambda step: (step(), 3 * gpu_steps.GIB)[1])
    peaks: gpu_steps.Peaks = {}
    rows = list(gpu_steps.step_rows("small", peaks))
    whats = sound(rows)
    kinds = ["limit", *gpu_steps.BARS]
    assert sorted(w.partition(": ")[2] for w in whats if w.startswith("peak")) == sorted(kinds)
    assert [w.rpartition(": ")[2] for w in whats if "the limit" in w] == [f"{kind}, batch 2" for kind in kinds[1:]]
    assert sum("/ LoRA" in what for what in whats) == 2
    plans = list(gpu_steps.plan_rows(peaks))
    assert len(sound(plans)) == len(kinds)
    assert {(row["ratio"], row["met"]) for row in plans} == {(1.5, False)}
    assert plans[0]["what"] == "plan (2.00 GiB) and measured peak (3.00 GiB) apart: limit"
    # A Fisher pass and full fine-tuning are for the first size.
    others = sound(list(gpu_steps.step_rows("larger", {})))
    assert len([w for w in others if w.startswith("peak")]) == 4


@pytest.mark.usefixtures("_on_the_cpu")
def test_steps_share_the_frozen_weights_and_train_what_they_say() -> None:
    model = gpu_models.make_model(SMALL)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = gpu_models.make_rows(SMALL, 2)
    batch = gpu_models.on_device(data)
    numel = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    trained = {}
    for kind, make in gpu_steps._makers(model, data).items():
        if kind.startswith("LoRA"):
            pytest.importorskip("peft")
        made = make()
        shared = {id(p) for p in made.parameters()} & {id(p) for p in model.parameters()}
        assert len(shared) == (0 if kind == "full" else len(base))
        gpu_steps.training_step(made, batch, trains=kind != "limit")()
        trained[kind] = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert trained["limit"] == 0
    assert trained["full"] == sum(p.numel() for p in model.parameters())
    assert trained[gpu_steps.FISHER] == round(0.005 * numel)
    for kind, ratio in ((gpu_steps.SCATTERED, 0.005), (gpu_steps.LESS, 0.002)):
        assert 0.5 * ratio * numel < trained[kind] < 2 * ratio * numel
    assert not any(p.requires_grad for p in model.parameters())
    # What is trained are deltas of some thousandths of the entries; nothing else moved.
    moved = sum(int((p != base[name]).sum()) for name, p in model.named_parameters())
    assert moved <= sum(trained[kind] for kind in (gpu_steps.FISHER, gpu_steps.SCATTERED, gpu_steps.LESS))


@pytest.mark.usefixtures("_on_the_cpu")
def test_a_step_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def full(_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_steps, "_with_lora", full)
    whats = sound(list(gpu_steps.step_rows("small", {})))
    assert not any("LoRA" in what for what in whats)
    assert any("full" in what for what in whats)
    assert "small does not fit the GPU: LoRA" in caplog.text


@pytest.mark.usefixtures("_on_the_cpu")
def test_squares_rows_need_the_kernel(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    assert list(gpu_products.squares_rows("small")) == []
    assert "the squares' kernel does not run here for torch.bfloat16" in caplog.text

    monkeypatch.setattr(gpu_products.kernels, "usable", lambda *_: True)
    monkeypatch.setattr(gpu_products.kernels, "add_squared_products", lambda *_: None)
    rows = list(gpu_products.squares_rows("small"))
    assert [row["bar"] for row in rows] == [">= 0.75", ""] * 2
    assert sound(rows)[0] == "cuBLAS weight gradient / squares kernel, [32, 32] bfloat16, 2 samples"
    assert len(list(gpu_products.squares_rows("larger"))) == 2


@pytest.mark.usefixtures("_on_the_cpu")
def test_way_rows(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    assert list(gpu_products.way_rows("small")) == []
    assert "the kernels of sparse gradients do not run here" in caplog.text

    monkeypatch.setattr(gpu_products.sparse_kernels, "usable", lambda *_: True)
    monkeypatch.setattr(gpu_products.sparse_kernels, "tile_entries", lambda *_: None)
    # A CPU's own way is none of a GPU's.
    prepare = gpu_products.prepare
    monkeypatch.setattr(gpu_products, "prepare", lambda index, shape, kind="dense": prepare(index, shape, kind))
    rows = list(gpu_products.way_rows("small"))
    assert "sampled" not in gpu_products.KINDS
    assert len(sound(rows)) == 3 * 3 * len(gpu_products.KINDS)
    assert [row["bar"] for row in rows[: len(gpu_products.KINDS)]] == [""] * (len(gpu_products.KINDS) - 1) + ["<= 1.15"]


@pytest.mark.usefixtures("_on_the_cpu")
def test_drawn_entries() -> None:
    index = gpu_products.draw_entries(32, 48, 0.005, 1 / 8)
    assert len(index) == 8
    assert index.dtype == torch.int32
    assert index.max() < 4 * 48
    assert (index % 48).max() < 6
    assert len(gpu_products.draw_entries(32, 48, 0.01, 1.0).unique()) == 15


@pytest.mark.usefixtures("_on_the_cpu")
def test_compile_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[str] = []

    def fresh(cache: str) -> dict[str, float]:
        caches.append(cache)
        return {"first": 4.0 if len(caches) == 1 else 0.3, "second": 0.1}

    monkeypatch.setattr(gpu_products, "_in_fresh_process", fresh)
    rows = list(gpu_products.compile_rows("small"))
    assert [(row["ratio"], row["met"]) for row in rows] == [(3.9, False), (0.2, True)]
    assert caches[0] == caches[1]


@pytest.mark.usefixtures("_on_the_cpu")
def test_seconds_of_first_and_second_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_products, "KINDS", ("dense",))
    found = gpu_products.first_and_second_call()
    assert found.keys() == {"first", "second"}
    assert all(seconds > 0 for seconds in found.values())


def test_a_fresh_process_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_products.sys, "executable", "false")
    with pytest.raises(RunError, match="bench: compiling the kernels failed"):
        gpu_products._in_fresh_process("cache")


@pytest.mark.usefixtures("_on_the_cpu")
def test_trainer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the Trainer would take the GPU")
    for name, value in {"SIZE": SMALL, "TOKENS": 8, "WARM_UP": 1, "STEPS": 2, "RATIO": 0.1}.items():
        monkeypatch.setattr(gpu_trainer, name, value)
    (row,) = gpu_trainer.trainer_rows()
    assert sound([row]) == ["step in fine_tune / bare loop, batch 2"]
    assert row["bar"] == "<= 1.1"


@needs_bitsandbytes
@pytest.mark.usefixtures("_on_the_cpu")
def test_quantized_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_language, "RATIO", 0.1)
    rows = list(gpu_language.quantized_rows("small"))
    assert sound(rows) == [
        "sparse step on an NF4 base / on a bfloat16 base, random mask 0.5 %, batch 2",
        "peak memory of a sparse step on an NF4 base, GiB",
    ]
    assert [row["bar"] for row in rows] == ["<= 1.35", ""]


@needs_bitsandbytes
@pytest.mark.usefixtures("_on_the_cpu")
def test_the_quantised_decoder_has_the_matrices_of_the_plain_one() -> None:
    model = gpu_models.make_model(SMALL)
    made = gpu_language.quantize_decoder(model)
    plain = dict(model.named_parameters())
    found = {f"{path}.weight": weight for path, _, weight in quantized_linears(made)}
    assert found.keys() == {name for name in plain if name.endswith("_proj.weight")}
    for name, weight in found.items():
        largest = plain[name].abs().max()
        # NF4's widest gap is 0.304 of a block's largest weight; double quantisation moves the scale a little.
        assert (dequantized(weight) - plain[name]).abs().max() <= 0.17 * largest
    assert {id(p) for p in made.parameters()} > {id(p) for n, p in plain.items() if n not in found}


@pytest.mark.usefixtures("_on_the_cpu")
def test_generation_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SIZE": SMALL, "PROMPTS": 4, "PROMPT_TOKENS": 6, "NEW_TOKENS": 3}.items():
        monkeypatch.setattr(gpu_language, name, value)
    (row,) = gpu_language.generation_rows()
    assert sound([row]) == ["generation of exact match / plain generate, 4 answers of 3 tokens, batch 2"]
    assert row["bar"] == "<= 1.2"


def a_row(what: str) -> dict[str, Any]:
    return figure("train", what, "small", 8, 2.0, limit=1.0)


def test_groups_are_told_as_they_are_measured_and_fail_alone(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="irdscale")
    monkeypatch.setattr(gpu, "free", lambda: None)

    def rows(*whats: str, then: Exception | None = None) -> Any:
        def measure() -> Iterator[dict[str, Any]]:
            for what in whats:
                yield a_row(what)
                assert f"MISSED    0.0 s  {what}, small x 8 tokens: 2 (2 to 2, bar <= 1.0)" in caplog.text
            if then is not None:
                raise then

        return measure

    groups = {
        "a": rows("one", then=torch.OutOfMemoryError()),
        "b": rows("two", then=ValueError("no\nway")),
        "c": rows("three"),
    }
    ended: list[int] = []
    found, failed = gpu.run_groups(groups, lambda: ended.append(1))
    assert [row["what"] for row in found] == ["one", "two", "three"]
    assert failed == ["b: ValueError: no way"]
    assert "bench: a: does not fit the GPU" in caplog.text
    assert len(ended) == 3
    monkeypatch.setattr(gpu, "BUDGET_S", -1)
    assert gpu.run_groups({"a": rows("one")}, lambda: None) == ([], [])
    assert "bench: a: left out" in caplog.text


def test_there_are_groups_for_both_sizes() -> None:
    groups = gpu._groups()
    assert len(groups) == gpu.GROUPS
    assert list(groups)[:2] == ["Fisher pass, 1B-like", "steps, 1B-like"]
    assert {"steps, 8B-like", "fine_tune", "compiling", "peaks against the plan"} <= set(groups)
