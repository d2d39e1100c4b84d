"""Digests of what a run read: what is a change of it, and what is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file

from irdscale.config.schema import ModelConfig
from irdscale.runs import identity
from irdscale.runs.identity import model_changes, model_digests
from tests.helpers import tiny_model


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return ModelConfig(path=str(tiny_model("bert", tmp_path / "model")))


def test_files_that_look_the_same_are_not_read_again(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model_digests(model)
    read, contents = [], identity._contents
    monkeypatch.setattr(identity, "_contents", lambda file: read.append(file.name) or contents(file))
    assert model_digests(model, before) == before
    assert read == []
    os.utime(Path(model.path) / "model.safetensors", (0, 0))
    assert model_changes(before, model_digests(model, before)) == []
    assert read == ["model.safetensors"]


def test_copies_shards_and_rewritten_settings_are_the_same_model(model: ModelConfig, tmp_path: Path) -> None:
    before, folder = model_digests(model), tmp_path / "elsewhere"
    shutil.copytree(model.path, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part{number}.safetensors")
    weight_map = {name: f"part{place % 2}.safetensors" for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"transformers_version": "9"}))
    (folder / "notes.txt").write_text("mine")
    copy = ModelConfig(path=str(folder))
    assert model_changes(before, model_digests(copy, before)) == []
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_dropout_prob": 0.5}))
    assert model_changes(before, model_digests(copy, before)) == ["config.json"]


@pytest.mark.parametrize("kept_time", [False, True])
def test_one_other_number_is_another_model(model: ModelConfig, kept_time: bool) -> None:
    before, file = model_digests(model), Path(model.path) / "model.safetensors"
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    if kept_time:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert model_changes(before, model_digests(model, before)) == ["model.safetensors"]


def test_samples_count_whatever_the_table_is_like() -> None:
    rows = {"input_ids": [[1, 2], [3]], "labels": [0, 1], "answer": ["a", None]}
    one = pa.table({**rows, "input_ids": pa.array(rows["input_ids"], pa.list_(pa.int32()))})
    other = pa.concat_tables([pa.table(rows).slice(0, 1), pa.table(rows).slice(1)])
    assert identity._samples(Dataset(one)) == identity._samples(Dataset(other))
    for name, value in (("input_ids", [[1], [2, 3]]), ("labels", [1, 0]), ("answer", ["a", ""])):
        assert identity._samples(Dataset(pa.table(rows | {name: value}))) != identity._samples(Dataset(one))
