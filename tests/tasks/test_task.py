"""load_task end to end: splits, limits, labels and what is refused."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.tasks import Task, load_task
from tests.helpers import tiny_model

GLUE = Path(__file__).resolve().parents[2] / "configs" / "data" / "glue"
OWN = {"kind": "sequence-classification", "columns": {"text": ["text"], "label": "label"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


def run(model: Path, dataset: Path, samples: int = 8, **task: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(model)},
            "task": {"dataset": str(dataset), "max_length": 16, **task},
            "fisher": {"samples": samples},
        }
    )


def write(path: Path, labels: list[Any]) -> Path:
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["text", "label"])
        rows.writerows([f"film {index}", label] for index, label in enumerate(labels))
    return path


def rows(task: Task, split: str) -> set[int]:
    return set(getattr(task, split)["row"])


@pytest.mark.parametrize("name", ["cola", "rte", "sst2", "stsb", "mrpc"])
def test_shipped_glue(model: Path, name: str) -> None:
    task = load_task(run(model, GLUE / name, limit={"train": 10}, max_length=64))
    assert task.name == f"glue/{name}"
    assert task.num_labels == (1 if name == "stsb" else 2)
    source = pq.read_table(GLUE / name / "validation.parquet").to_pydict()
    if name == "mrpc":
        assert (len(task.selection), len(task.test)) == (408, 1725)
        assert (task.origin["selection"], task.origin["test"]) == ("validation", "test")
    else:
        assert rows(task, "selection") | rows(task, "test") == set(range(len(source["label"])))
        assert not rows(task, "selection") & rows(task, "test")
        assert task.origin["test"] == "half of validation"
    sample = task.selection[3]
    assert sample["labels"] == pytest.approx(source["label"][sample["row"]])
    text = source["sentence1" if "sentence1" in source else "sentence"][sample["row"]]
    assert task.tokenizer(text).input_ids[:6] == sample["input_ids"][:6]
    if name not in ("stsb", "mrpc"):
        assert np.mean(task.selection["labels"]) == pytest.approx(np.mean(task.test["labels"]), abs=0.01)


def test_same_seed_same_task_other_seed_other_halves(model: Path) -> None:
    limit = {"train": 50}
    halves = GLUE / "sst2"
    first, again, other = (load_task(run(model, halves, limit=limit, split_seed=seed)) for seed in (0, 0, 1))
    assert first.train[:] == again.train[:]
    assert first.test[:] == again.test[:]
    assert rows(first, "test") != rows(other, "test")
    assert rows(first, "train") != rows(other, "train")


def test_one_file_is_carved_without_overlap(model: Path, tmp_path: Path) -> None:
    task = load_task(run(model, write(tmp_path / "a.csv", ["no", "yes", "maybe"] * 40), **OWN))
    assert task.label_names == ["maybe", "no", "yes"]
    parts = [rows(task, split) for split in ("train", "selection", "test")]
    assert [len(part) for part in parts] == [96, 12, 12]
    assert set.union(*parts) == set(range(120))
    assert np.bincount(task.test["labels"]).tolist() == [4, 4, 4]
    assert set(task.compute_metrics(np.eye(3), np.arange(3))) == {"accuracy", "f1", "matthews_correlation"}
    assert task.metric == "accuracy"


def test_a_test_split_without_labels_is_not_used(model: Path, tmp_path: Path) -> None:
    for name, labels in (("train", [0, 1] * 20), ("validation", [0, 1] * 5), ("test", [-1] * 7)):
        write(tmp_path / f"{name}.csv", labels)
    task = load_task(run(model, tmp_path, **OWN))
    assert (len(task.selection), len(task.test)) == (5, 5)
    assert task.origin["test"] == "half of validation"


def test_limits_draw_rows_of_their_split(model: Path) -> None:
    limit = {"train": 20, "selection": 10, "test": 12}
    small = load_task(run(model, GLUE / "sst2", limit=limit))
    large = load_task(run(model, GLUE / "sst2", limit={split: 2 * size for split, size in limit.items()}))
    for split, size in limit.items():
        assert len(getattr(small, split)) == size
        assert rows(small, split) < rows(large, split)
    assert not rows(large, "selection") & rows(large, "test")


@pytest.mark.parametrize(("split", "size"), [("train", 2490), ("selection", 139), ("test", 138)])
def test_a_limit_beyond_the_split_is_refused(model: Path, split: str, size: int) -> None:
    with pytest.raises(InputError, match=rf"task\.limit\.{split}: found {size + 1}; expected at most {size}, the size"):
        load_task(run(model, GLUE / "rte", limit={split: size + 1}))


def test_a_limit_of_the_whole_split_is_taken(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [0, 1] * 30)
    limit = {"train": 48, "selection": 6, "test": 6}
    assert len(load_task(run(model, path, limit=limit, **OWN)).train) == 48


def test_more_fisher_samples_than_data_are_refused(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [0, 1] * 30)
    load_task(run(model, path, samples=30, limit={"train": 30}, **OWN))
    with pytest.raises(InputError, match=r"fisher\.samples: found 31; expected at most 30, .*30 rows drawn from"):
        load_task(run(model, path, samples=31, limit={"train": 30}, **OWN))


def test_bad_labels_name_file_column_and_row(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [0, 1] * 20 + [""])
    with pytest.raises(InputError, match=r"a\.csv: column 'label', row 40: task\.columns\.label: found no label"):
        load_task(run(model, path, **OWN))
    write(tmp_path / "a.csv", [0, 1] * 20 + [-3])
    with pytest.raises(InputError, match=r"row 40: task\.columns\.label: label out of range: found -3"):
        load_task(run(model, path, **OWN))


def test_a_label_only_in_validation_is_refused(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ["a", "b"] * 10)
    write(tmp_path / "validation.csv", ["a", "b", "c"])
    with pytest.raises(
        InputError, match=r"validation\.csv: column 'label', row 2: task\.columns\.label: found label 'c'"
    ):
        load_task(run(model, tmp_path, **OWN))


def test_glue_labels_have_a_range(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "glue" / "sst2"
    folder.mkdir(parents=True)
    table = pq.read_table(GLUE / "sst2" / "validation.parquet").slice(0, 20).to_pandas()
    table.to_parquet(folder / "validation.parquet")
    table.loc[5, "label"] = 2
    table.to_parquet(folder / "train.parquet")
    with pytest.raises(
        InputError,
        match=r"row 5: task\.columns\.label: label out of range: found 2; expected a class number from 0 to 1",
    ):
        load_task(run(model, folder))


def test_too_few_rows_to_carve(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the selection split \(10 % of train\) is empty"):
        load_task(run(model, write(tmp_path / "a.csv", [0, 1, 0, 1]), **OWN))


def test_regression_on_own_data(model: Path, tmp_path: Path) -> None:
    values = [random.Random(index).random() for index in range(60)]
    own = {**OWN, "kind": "regression"}
    task = load_task(run(model, write(tmp_path / "a.csv", values), **own))
    assert (task.num_labels, task.metric, task.label_names) == (1, "pearson", [])
    assert task.train[0]["labels"] == pytest.approx(values[task.train[0]["row"]])
    with pytest.raises(InputError, match="the selection split's labels are all equal"):
        load_task(run(model, write(tmp_path / "b.csv", [0.5] * 60), **own))


def test_metric_that_does_not_fit_glue(model: Path) -> None:
    with pytest.raises(InputError, match=r"task\.metric: found 'spearman' with kind 'sequence-classification'"):
        load_task(run(model, GLUE / "rte", metric="spearman"))
    task = load_task(
        run(model, GLUE / "mrpc", metric="matthews_correlation", limit={"train": 20, "selection": 9, "test": 9})
    )
    assert task.metrics == ("matthews_correlation", "f1", "accuracy")


def test_nothing_is_written_beside_the_data(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [0, 1] * 30)
    task = load_task(run(model, path, **OWN))
    assert [child.name for child in tmp_path.iterdir()] == ["a.csv"]
    assert task.train.cache_files == []
