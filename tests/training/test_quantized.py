"""Whole runs on quantised bases: training, adapters, export, ranks, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import irdscale
from irdscale.config.compare import LoraConfig
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.models.build import build_model
from irdscale.models.quantized import quantized_linears
from irdscale.sparse import base_hash, trained_numbers
from irdscale.tasks import Task, load_task
from irdscale.training.base_model import KeptBase
from irdscale.training.evaluate import evaluate_model
from irdscale.training.head_warmup import model_to_score
from irdscale.training.one_mask import run_evaluate, run_export, run_train
from irdscale.training.trainable import sparse_model
from irdscale.training.trainer import fine_tune
from tests import training_oracle
from tests.helpers import tiny_model
from tests.quantized import KINDS, needs_bitsandbytes, on_ranks, random_entries
from tests.search.test_language import FEW, QUICKSTART
from tests.spawned import run_ranks
from tests.training_oracle import changed

pytestmark = needs_bitsandbytes


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Task]:
    file = training_oracle.toy(tmp_path_factory.mktemp("quantized") / "llama", "llama", text=True)
    config = training_oracle.load(file, "model.quantize=nf4")
    return config, load_task(config)


@pytest.mark.parametrize("kind", KINDS)
def test_train_evaluate_and_export(kind: str, tmp_path: Path) -> None:
    more = ["train.gradient_checkpointing=true", "fisher.offload=true", f"output={tmp_path / 'out'}"]
    config = load_config(QUICKSTART, [*FEW, *more, f"model.quantize={kind}"])
    found = run_train(config, progress=False)
    assert found["loss"]["ended"] < found["loss"]["began"]
    assert run_evaluate(config, found["adapter"], progress=False)["test"] == found["test"]
    run_export(config, found["adapter"], str(tmp_path / "merged"))
    plain = {"path": str(tmp_path / "merged"), "quantize": None}
    again = config.model_copy(update={"model": config.model.model_copy(update=plain)})
    task = load_task(again)
    metrics = evaluate_model(build_model(again, task, 0)[0], task, task.test, 16)
    assert metrics["perplexity"] == pytest.approx(found["test"]["perplexity"], rel=1e-5)
    with pytest.raises(InputError, match="format: shira: found a quantised base"):
        run_export(config, found["adapter"], str(tmp_path / "shira"), format="shira")


def test_an_adapter_knows_its_base(toy: tuple[RunConfig, Task], tmp_path: Path) -> None:
    config, task = toy
    model = sparse_model(config, task, random_entries(config, task), 0)
    fine_tune(model, task, changed(config, steps=3), 0)
    irdscale.save_adapter(model, tmp_path / "adapter")
    again = irdscale.load_adapter(build_model(config, task, 0)[0], tmp_path / "adapter")
    batch = task.collate([task.test[i] for i in range(4)])
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
    irdscale.switch_adapter(again, tmp_path / "adapter")
    for other in (None, "int8"):
        base = config.model.model_copy(update={"quantize": other})
        fresh = build_model(config.model_copy(update={"model": base}), task, 0)[0]
        with pytest.raises(InputError, match=r"adapter for another base: found weights .*model\.quantize as in"):
            irdscale.load_adapter(fresh, tmp_path / "adapter")


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_new_head_is_not_quantised_and_is_drawn_as_ever(family: str, tmp_path: Path) -> None:
    file = training_oracle.toy(tmp_path / family, family)
    config = training_oracle.load(file, "model.quantize=nf4", "fisher.head_warmup=2")
    task = load_task(config)
    plain = config.model_copy(update={"model": config.model.model_copy(update={"quantize": None})})
    model, new = build_model(config, task, 5)
    expected, names = build_model(plain, task, 5)
    assert new == names
    for name in new:
        assert torch.equal(model.get_parameter(name), expected.get_parameter(name)), name
    layers = {path for path, *_ in quantized_linears(model)}
    assert layers
    assert not any(path.startswith(("classifier", "score")) or "pooler" in path for path in layers)
    with model_to_score(config, task, progress=False) as (warmed, _):
        assert len(list(quantized_linears(warmed))) == len(layers)
        assert not torch.equal(warmed.get_parameter(new[0]), expected.get_parameter(new[0]))


def test_one_load_serves_many(toy: tuple[RunConfig, Task]) -> None:
    config, task = toy
    kept, found = KeptBase(), []
    for _ in range(3):
        with kept.lend(config, task, 0) as (model, _):
            model = irdscale.sparsify(model, random_entries(config, task))
            fine_tune(model, task, changed(config, steps=2), 0)
            found.append((base_hash(model), trained_numbers(model)[0]))
    assert kept.loads == 1
    assert len({base for base, _ in found}) == 1
    for _, deltas in found[1:]:
        assert all(torch.equal(deltas[name], values) for name, values in found[0][1].items())


def test_lora_on_a_quantised_base(toy: tuple[RunConfig, Task]) -> None:
    config, task = toy
    model = sparse_model(config, task, None, 0, lora=LoraConfig(rank=2))
    trend = fine_tune(model, task, changed(config, steps=6), 0)
    assert trend is not None
    deltas, dense = trained_numbers(model)
    assert not deltas
    assert sum("lora_B" in name and bool(value.any()) for name, value in dense.items()) > 3


@pytest.mark.usefixtures("ranks_of_deepspeed")
def test_two_ranks_find_what_one_process_finds(toy: tuple[RunConfig, Task]) -> None:
    config, task = toy
    folder = Path(config.model.path).parents[1]
    run_ranks(on_ranks, 2, str(folder), [None, 2])
    found = torch.load(folder / "found-2.pt", weights_only=False)
    model = build_model(config, task, 0)[0]
    fisher = irdscale.accumulate_fisher(model, task.train.select(range(7)), collate_fn=task.collate)
    for layout in ("replicated", "sharded"):
        diagonal, traces = found[layout]
        for name, expected in fisher.diagonal.items():
            torch.testing.assert_close(diagonal[name], expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
        torch.testing.assert_close(traces, fisher.sample_trace, rtol=1e-5, atol=0)
    model = sparse_model(config, task, random_entries(config, task), 3)
    trend = fine_tune(model, task, config, 3)
    deltas, _ = trained_numbers(model)
    assert trend is not None
    for stage in ("stage None", "stage 2"):
        losses, others, base = found[stage]
        assert base == base_hash(model)
        assert float(losses[-1]) < float(losses[0])
        for name, values in deltas.items():
            torch.testing.assert_close(others[name], values, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n} {m}")


def _refused(config: RunConfig, task: Task) -> str:
    with pytest.raises(InputError) as caught:
        build_model(config, task, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_is_told_in_one_line(
    toy: tuple[RunConfig, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, task = toy
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    zero = changed(config, deepspeed=str(tmp_path / "zero3.json"))
    assert _refused(zero, task).startswith("model.quantize: found nf4 with ZeRO-3")
    tiny_model("llama", tmp_path / "none", causal=True, num_hidden_layers=0)
    without = config.model.model_copy(update={"path": str(tmp_path / "none")})
    found = _refused(config.model_copy(update={"model": without}), task)
    assert found.startswith("model.quantize: found nf4 with LlamaForCausalLM, which has no linear layer")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = _refused(config, task)
    assert found.startswith("model.quantize: found nf4, but no usable bitsandbytes")
    assert found.endswith("expected it: pip install 'irdscale[quantize]'")


def test_float64_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model.*quantize: found 'nf4' with dtype 'float64'") as caught:
        load_config(QUICKSTART, ["model.quantize=nf4", "model.dtype=float64"])
    assert "\n" not in str(caught.value)
    found: Any = None
    with pytest.raises(InputError, match=r"model\.quantize: found 'int4'"):
        found = load_config(QUICKSTART, ["model.quantize=int4"])
    assert found is None
