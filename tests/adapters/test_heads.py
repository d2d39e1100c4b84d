"""Adapters keep their class names and their kind of task, which other models and other data must have too."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from irdscale import Mask, load_adapter, merge, save_adapter, sparsify, switch_adapter, unload
from irdscale.adapters import adapter_head
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.training.one_mask import run_evaluate, run_export, run_train
from tests.search.toy import write_config
from tests.tiny_models import tiny

CALLED = {0: "neg", 1: "pos"}
NAMES = {"a": ["neg", "pos", "mid"], "b": ["MID", "neg", "pos"], "c": ["x", "y", "z"]}


def named(names: list[str] | None, head: str = "classification", **more: Any) -> Any:
    model = tiny("bert", head, **more)
    if names is not None:
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    return model


def saved(folder: Path, model: Any) -> Path:
    save_adapter(sparsify(model, Mask({}, {}), always_train=["^classifier"]), folder)
    return folder


def test_a_fresh_model_gets_the_adapter_s_classes_and_loses_them_again(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", named(NAMES["a"], problem_type="single_label_classification"))
    head = adapter_head(folder)
    assert head is not None
    assert (head.kind, list(head.names)) == ("sequence-classification", NAMES["a"])
    model = named(None)
    fresh = dict(model.config.id2label), dict(model.config.label2id), model.config.problem_type
    load_adapter(model, folder)
    assert model.config.id2label == {0: "neg", 1: "pos", 2: "mid"}
    assert model.config.label2id == {"neg": 0, "pos": 1, "mid": 2}
    assert model.config.problem_type == "single_label_classification"
    unload(model)
    assert (model.config.id2label, model.config.label2id, model.config.problem_type) == fresh
    merge(load_adapter(model, folder)).save_pretrained(tmp_path / "merged")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config.id2label[2] == "mid"


def test_another_order_becomes_the_adapter_s_and_other_names_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", named(NAMES["a"]))
    assert load_adapter(named(NAMES["b"]), folder).config.id2label == dict(enumerate(NAMES["a"]))
    model = named(NAMES["c"])
    with pytest.raises(
        InputError, match=r"found the classes x, y, z; expected those of the adapter .*: neg, pos, mid$"
    ):
        load_adapter(model, folder)
    assert model.config.id2label == dict(enumerate(NAMES["c"]))
    unload(load_adapter(model, saved(tmp_path / "plain", named(None))))
    assert model.config.id2label == dict(enumerate(NAMES["c"]))


def test_adapters_of_other_classes_take_turns_on_a_model_without_names(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / name, named(NAMES[name])) for name in ("a", "c"))
    model = load_adapter(named(None), first)
    assert switch_adapter(model, second).config.id2label == dict(enumerate(NAMES["c"]))
    assert unload(model).config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    own = load_adapter(named(NAMES["b"]), first)
    with pytest.raises(InputError, match="found the classes MID, neg, pos; expected those of the adapter"):
        switch_adapter(own, second)
    assert own.config.id2label == dict(enumerate(NAMES["a"]))


def test_another_kind_of_task_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", named(None, "regression"))
    head = adapter_head(folder)
    assert head is not None
    assert (head.kind, head.names) == ("regression", ())
    with pytest.raises(InputError, match="found a model for sequence-classification; expected one for regression"):
        load_adapter(named(None, problem_type="single_label_classification"), folder)


def test_damaged_heads_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", named(NAMES["a"]))
    meta = json.loads((folder / "adapter.json").read_text())
    for head in ({"kind": 3, "classes": []}, {"kind": None, "classes": [1]}, ["a"]):
        (folder / "adapter.json").write_text(json.dumps({**meta, "head": head}))
        with pytest.raises(InputError, match="damaged adapter: found head"):
            load_adapter(named(None), folder)
    del meta["head"]
    (folder / "adapter.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="damaged adapter: no valid 'head'"):
        load_adapter(named(NAMES["c"]), folder)
    (folder / "adapter.json").write_text(json.dumps({**meta, "head": None}))
    assert load_adapter(named(NAMES["c"]), folder).config.id2label == dict(enumerate(NAMES["c"]))


def relabelled(config: RunConfig, folder: Path, called: dict[int, Any], suffix: str = ".csv") -> RunConfig:
    """The toy's data with other labels, in files of another type."""
    folder.mkdir()
    for file in Path(config.task.dataset).iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [{**row, "label": called[row["label"]]} for row in rows]
        target = (folder / file.name).with_suffix(suffix)
        if suffix == ".parquet":
            classes = datasets.ClassLabel(names=[called[1], called[0]])
            features = datasets.Features({"text": datasets.Value("string"), "label": classes})
            datasets.Dataset.from_list(rows, features=features).to_parquet(target)
        elif suffix == ".jsonl":
            target.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            with target.open("w", newline="") as stream:
                table = csv.DictWriter(stream, ["text", "label"])
                table.writeheader()
                table.writerows(rows)
    return config.model_copy(update={"task": config.task.model_copy(update={"dataset": str(folder)})})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    """A training on the classes neg and pos."""
    folder = tmp_path_factory.mktemp("heads")
    config = relabelled(load_config(write_config(folder)), folder / "names", CALLED)
    return config, run_train(config, progress=False)


@pytest.mark.parametrize(
    ("called", "suffix"),
    [({0: 0, 1: 1}, ".csv"), ({0: "Neg", 1: "POS"}, ".csv"), ({0: "neg", 1: "POS"}, ".jsonl"), (CALLED, ".parquet")],
)
def test_evaluate_takes_the_same_classes_however_they_are_ordered(
    trained: tuple[RunConfig, dict[str, Any]], tmp_path: Path, called: dict[int, Any], suffix: str
) -> None:
    config, result = trained
    # Upper case comes first in the alphabet.
    data = relabelled(load_config(write_config(Path(config.model.path).parent)), tmp_path / "data", called, suffix)
    found = run_evaluate(data, result["adapter"], progress=False)
    assert found["test"] == result["test"]


@pytest.mark.parametrize("called", [{0: "no", 1: "yes"}, {0: "pos_", 1: "neg_"}])
def test_evaluate_and_export_refuse_other_classes(
    trained: tuple[RunConfig, dict[str, Any]], tmp_path: Path, called: dict[int, Any]
) -> None:
    config, result = trained
    data = relabelled(load_config(write_config(Path(config.model.path).parent)), tmp_path / "data", called)
    for verb in (
        lambda: run_evaluate(data, result["adapter"], progress=False),
        lambda: run_export(data, result["adapter"], str(tmp_path / "merged")),
    ):
        with pytest.raises(InputError, match=r"column 'label': found the classes .*; expected those of .*: neg, pos$"):
            verb()
    assert not (tmp_path / "merged").exists()


def test_names_do_not_fit_an_adapter_of_numbers(trained: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> None:
    config, _ = trained
    numbers = load_config(write_config(Path(config.model.path).parent, output=str(tmp_path / "out")))
    result = run_train(numbers, progress=False)
    with pytest.raises(InputError, match=r"found the classes neg, pos; expected those of the adapter .*: 0, 1"):
        run_evaluate(config, result["adapter"], progress=False)


def test_a_regression_is_no_classification(trained: tuple[RunConfig, dict[str, Any]]) -> None:
    config, result = trained
    task = config.task.model_copy(update={"kind": "regression", "metric": None})
    with pytest.raises(
        InputError, match=r"task\.kind: found 'regression'; expected 'sequence-classification', the kind"
    ):
        run_evaluate(config.model_copy(update={"task": task}), result["adapter"], progress=False)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_was_merged_is_a_base_whose_classes_count(
    trained: tuple[RunConfig, dict[str, Any]], tmp_path: Path, suffix: str
) -> None:
    config, result = trained
    run_export(config, result["adapter"], str(tmp_path / "merged"))
    written = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config
    assert written.id2label == {0: "neg", 1: "pos"}
    called = {0: "neg", 1: "Pos"}
    based = relabelled(load_config(write_config(Path(config.model.path).parent)), tmp_path / "data", called, suffix)
    based = based.model_copy(
        update={
            "model": based.model.model_copy(update={"path": str(tmp_path / "merged")}),
            "train": based.train.model_copy(update={"steps": 1, "learning_rate": 1e-9, "always_train": []}),
            "output": str(tmp_path / "out"),
        }
    )
    again = run_train(based, progress=False)
    assert again["test"]["accuracy"] == result["test"]["accuracy"]
    # F1 is that of the second class, which data with an order of its own decides.
    assert (again["test"]["f1"] == result["test"]["f1"]) == (suffix == ".csv")
    assert run_evaluate(based, again["adapter"], progress=False)["test"] == again["test"]
    adapted = load_adapter(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"), again["adapter"])
    assert adapted.config.id2label == {0: "neg", 1: "Pos"}
    with torch.no_grad():
        assert adapted(input_ids=torch.tensor([[2, 8, 3]])).logits.shape == (1, 2)
