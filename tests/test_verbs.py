"""fisher, train, evaluate and export on a toy task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from irdscale import Mask, accumulate_fisher, load_adapter, top_k
from irdscale.config import RunConfig, load_config
from irdscale.errors import InputError, RunError
from irdscale.fisher.pool import draw_samples
from irdscale.tasks import build_model, load_task
from irdscale.verbs import run_evaluate, run_export, run_fisher, run_train
from tests.helpers import tiny_model
from tests.search.toy import write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return load_config(write_config(tmp_path_factory.mktemp("verbs")))


@pytest.fixture(scope="module")
def trained(config: RunConfig) -> dict[str, object]:
    return run_train(config, progress=False)


def test_fisher_writes_the_mask_of_the_pool(config: RunConfig) -> None:
    result = run_fisher(config, progress=False)
    task = load_task(config)
    model, new = build_model(config, task, 0)
    pool = draw_samples(config, task, 16, "pool")
    fisher = accumulate_fisher(model, task.train.select(pool), collate_fn=task.collate, exclude=[f"^{n}$" for n in new])
    expected = top_k(fisher, round(0.05 * result["parameters"]))
    written = Mask.load(result["mask"])
    shared = sum(len(set(i.tolist()) & set(written.indices[n].tolist())) for n, i in expected.indices.items())
    assert written.k == expected.k == result["params"]
    assert shared >= 0.99 * written.k, "but for the rounding of near ties"
    assert not set(new) & set(written.shapes)
    assert result["sample_gradients"] == result["samples"] == 16
    traces = json.loads((Path(config.output) / "traces.json").read_text())
    assert traces["trace"] == pytest.approx(fisher.sample_trace.tolist(), rel=1e-4)
    assert traces["row"] == [task.train[i]["row"] for i in pool]


def test_train_with_a_given_mask_equals_training_with_a_ratio(
    config: RunConfig, trained: dict[str, object], tmp_path: Path
) -> None:
    elsewhere = config.model_copy(update={"output": str(tmp_path)})
    again = run_train(elsewhere, mask=str(Path(config.output) / "mask"), progress=False)
    for name in ("mask", "params", "head", "selection", "test"):
        assert again[name] == trained[name], name
    bytes_of = [(Path(p) / "adapter.safetensors").read_bytes() for p in (trained["adapter"], again["adapter"])]
    assert bytes_of[0] == bytes_of[1]


def test_evaluate_gives_what_training_said(config: RunConfig, trained: dict[str, object]) -> None:
    result = run_evaluate(config, str(trained["adapter"]), progress=False)
    assert result["selection"] == trained["selection"]
    assert result["test"] == trained["test"]
    assert result["params"] == trained["params"]


def test_a_head_that_is_not_trained_whole_is_drawn_as_in_training(config: RunConfig, tmp_path: Path) -> None:
    frozen = config.model_copy(
        update={
            "output": str(tmp_path),
            "train": config.train.model_copy(update={"always_train": []}),
            "search": config.search.model_copy(update={"seeds": [5]}),
        }
    )
    result = run_train(frozen, progress=False)
    assert result["head"] == 0
    other_seeds = frozen.model_copy(update={"search": config.search})
    assert run_evaluate(other_seeds, result["adapter"], progress=False)["test"] == result["test"]


def test_export_loads_with_plain_transformers(config: RunConfig, trained: dict[str, object], tmp_path: Path) -> None:
    target = tmp_path / "merged"
    run_export(config, str(trained["adapter"]), str(target))
    task = load_task(config)
    adapted = load_adapter(build_model(config, task, 5)[0], str(trained["adapter"]))
    plain = AutoModelForSequenceClassification.from_pretrained(target).eval()
    batch = task.collate([task.test[i] for i in range(8)])
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, adapted(**batch).logits)
    assert AutoTokenizer.from_pretrained(target)("a good film").input_ids == task.tokenizer("a good film").input_ids
    with pytest.raises(InputError, match="expected a new or empty folder"):
        run_export(config, str(trained["adapter"]), str(target))


def test_an_adapter_of_another_base_is_refused(config: RunConfig, trained: dict[str, object], tmp_path: Path) -> None:
    other = tiny_model("bert", tmp_path / "model", seed=1)
    changed = config.model_copy(update={"model": config.model.model_copy(update={"path": str(other)})})
    for verb in (
        lambda: run_evaluate(changed, str(trained["adapter"]), progress=False),
        lambda: run_export(changed, str(trained["adapter"]), str(tmp_path / "to")),
    ):
        with pytest.raises(InputError, match="adapter for another base"):
            verb()
    assert not (tmp_path / "to").exists()


def test_a_mask_of_another_model_is_refused(config: RunConfig, tmp_path: Path) -> None:
    mask = Mask({"other.weight": torch.tensor([1], dtype=torch.int32)}, {"other.weight": (3,)})
    mask.save(tmp_path / "mask")
    with pytest.raises(InputError, match=r"mask: other.weight: the model has no such parameter"):
        run_train(config, mask=str(tmp_path / "mask"), progress=False)


def test_output_that_cannot_be_written(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = config.model_copy(update={"output": str(tmp_path / "file/out")})
    with pytest.raises(RunError, match="cannot write"):
        run_fisher(blocked, progress=False)
