"""fisher, train, evaluate and export on a toy task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from irdscale import Mask, accumulate_fisher, load_adapter, top_k
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError, RunError
from irdscale.fisher.pool import draw_samples
from irdscale.models.build import build_model
from irdscale.tasks import load_task
from irdscale.training.one_mask import run_evaluate, run_export, run_fisher, run_train
from tests.helpers import tiny_model
from tests.search.toy import write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return load_config(write_config(tmp_path_factory.mktemp("verbs")))


@pytest.fixture(scope="module")
def trained(config: RunConfig) -> dict[str, Any]:
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


def test_a_loss_that_rises_is_a_warning(
    config: RunConfig, trained: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(trained["warnings"]) == trained["loss"]["rose"]
    fast = config.train.model_copy(update={"learning_rate": 30.0})
    wild = config.model_copy(update={"output": str(tmp_path), "train": fast})
    result = run_train(wild, mask=str(Path(config.output) / "mask"), progress=False)
    (said,) = result["warnings"]
    assert said.startswith(f"The loss rose from {result['loss']['began']:.4g} to {result['loss']['ended']:.4g}: ")
    assert said in caplog.messages


def test_evaluate_gives_what_training_said(config: RunConfig, trained: dict[str, object]) -> None:
    result = run_evaluate(config, str(trained["adapter"]), progress=False)
    assert result["selection"] == trained["selection"]
    assert result["test"] == trained["test"]
    assert result["test_error"] == trained["test_error"]
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


def test_export_in_bfloat16(config: RunConfig, tmp_path: Path) -> None:
    half = config.model_copy(
        update={"output": str(tmp_path), "model": config.model.model_copy(update={"dtype": "bfloat16"})}
    )
    adapter = run_train(half, progress=False)["adapter"]
    run_export(half, adapter, str(tmp_path / "merged"))
    task = load_task(half)
    adapted = load_adapter(build_model(half, task, 0)[0], adapter)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.dtype == torch.bfloat16
    batch = task.collate([task.test[i] for i in range(8)])
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, adapted(**batch).logits)


@pytest.fixture(scope="module")
def linear(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, object]]:
    """Trained on a mask of weights that SHiRA knows."""
    include = [r"encoder\..*(query|key|value|dense)\.weight"]
    linear = config.model_copy(
        update={
            "output": str(tmp_path_factory.mktemp("linear")),
            "fisher": config.fisher.model_copy(update={"include": include}),
        }
    )
    return linear, run_train(linear, progress=False)


def test_export_for_shira(linear: tuple[RunConfig, dict[str, object]], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    config, trained = linear
    result = run_export(config, str(trained["adapter"]), str(tmp_path / "peft"), format="shira")
    assert (result["peft"], result["params"]) == (str(tmp_path / "peft"), trained["params"])
    assert "classifier" in result["whole"]
    assert result["layers"] > 0
    base = AutoModelForSequenceClassification.from_pretrained(config.model.path, num_labels=2)
    task = load_task(config)
    adapted = load_adapter(build_model(config, task, 5)[0], str(trained["adapter"]))
    found = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    batch = task.collate([task.test[i] for i in range(8)])
    with torch.no_grad():
        assert torch.equal(found(**batch).logits, adapted(**batch).logits)


def test_export_for_shira_takes_an_untrained_new_head_along(config: RunConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    frozen = config.model_copy(
        update={
            "output": str(tmp_path),
            "train": config.train.model_copy(update={"always_train": []}),
            "fisher": config.fisher.model_copy(update={"include": [r"intermediate\.dense\.weight"]}),
        }
    )
    adapter = run_train(frozen, progress=False)["adapter"]
    assert run_export(frozen, adapter, str(tmp_path / "peft"), format="shira")["whole"] == ["classifier"]
    base = AutoModelForSequenceClassification.from_pretrained(config.model.path, num_labels=2)
    task = load_task(frozen)
    adapted = load_adapter(build_model(frozen, task, 0)[0], adapter)
    found = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    batch = task.collate([task.test[i] for i in range(8)])
    with torch.no_grad():
        assert torch.equal(found(**batch).logits, adapted(**batch).logits)


def test_exports_that_cannot_be(config: RunConfig, trained: dict[str, object], tmp_path: Path) -> None:
    adapter, to = str(trained["adapter"]), str(tmp_path / "to")
    for wrong, message in (
        ("shirra", r'format: found \'shirra\' \(did you mean "shira"\?\); expected merged or shira'),
        (
            "shira",
            r"format: shira: bert\..*: found .* entries in .* outside untied nn.Linear weights; expected",
        ),
    ):
        with pytest.raises(InputError, match=message):
            run_export(config, adapter, to, format=wrong)
    for format in ("shira", "merged"):
        with pytest.raises(InputError, match=f"format: found '{format}' with to=hub:me/x; expected none"):
            run_export(config, adapter, "hub:me/x", format=format)
    with pytest.raises(InputError, match="my adapter: found no name on the hub; expected OWNER/NAME"):
        run_export(config, adapter, "hub:my adapter")
    with pytest.raises(RunError, match=r"cannot push to me/x on the hub: .*offline"):
        run_export(config, adapter, "hub:me/x")
    (tmp_path / "file").write_text("")
    for taken in ("file", "."):
        for format in (None, "merged", "shira"):
            with pytest.raises(InputError, match="exists; expected a new or empty folder"):
                run_export(config, adapter, str(tmp_path / taken), format=format)
    with pytest.raises(RunError, match="cannot write"):
        run_export(config, adapter, str(tmp_path / "file/to"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_export_uploads_the_adapter_as_it_is(
    config: RunConfig, trained: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        "irdscale.training.one_mask.push_adapter", lambda *a: calls.append(a) or "https://hub.example/me/x"
    )
    result = run_export(config, str(trained["adapter"]), "hub:me/x")
    assert result == {"hub": "https://hub.example/me/x", "adapter": trained["adapter"]}
    assert calls == [(trained["adapter"], "me/x")]


def test_adapters_may_come_from_the_hub(
    config: RunConfig, trained: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pulled = []
    monkeypatch.setattr(
        "irdscale.adapters.hub.pull_adapter", lambda name: pulled.append(name) or Path(str(trained["adapter"]))
    )
    assert run_evaluate(config, "me/sparse", progress=False)["test"] == trained["test"]
    run_export(config, "me/sparse", str(tmp_path / "merged"))
    assert set(pulled) == {"me/sparse"}


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
    elsewhere = config.model_copy(update={"output": str(tmp_path / "out")})
    with pytest.raises(InputError, match=r"mask: other.weight: the model has no such parameter"):
        run_train(elsewhere, mask=str(tmp_path / "mask"), progress=False)


def test_output_that_cannot_be_written(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = config.model_copy(update={"output": str(tmp_path / "file/out")})
    with pytest.raises(RunError, match="cannot write"):
        run_fisher(blocked, progress=False)
