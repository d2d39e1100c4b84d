"""Reading local files and folders and hub data sets, and what is said of those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from irdscale.config import TaskConfig
from irdscale.errors import InputError
from irdscale.tasks import data
from irdscale.tasks.data import find_source, read_splits

COLUMNS = {"text": ["text"], "label": "label"}
ROWS = [{"text": "one", "label": 0}, {"text": "two, or", "label": 1}]


def task(dataset: Path | str, **values: Any) -> TaskConfig:
    own = {"kind": "sequence-classification", "columns": COLUMNS}
    return TaskConfig.model_validate({"dataset": str(dataset), **own, **values})


def write(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    rows = ROWS if rows is None else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(json.dumps(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(dataset: Path | str, **values: Any) -> dict[str, data.Split]:
    return read_splits(find_source(task(dataset, **values)))


def refused(message: str, dataset: Path | str, **values: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(dataset, **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_one_file_is_train(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"reviews{suffix}")
    assert find_source(task(path)).name == "reviews"
    splits = read(path)
    assert list(splits) == ["train"]
    assert splits["train"].texts == [["one", "two, or"]]
    assert splits["train"].labels == [0, 1]
    assert sorted(tmp_path.iterdir()) == [path], "something was written beside the user's data"


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_folder_of_splits(tmp_path: Path, suffix: str) -> None:
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}{suffix}")
    (tmp_path / "README.md").write_text("about")
    splits = read(tmp_path)
    assert list(splits) == ["train", "validation", "test"]
    assert splits["validation"].where.endswith(f"dev{suffix}")


def test_subset_is_a_folder_inside(tmp_path: Path) -> None:
    write(tmp_path / "small" / "train.csv")
    assert find_source(task(tmp_path, subset="small")).path == tmp_path / "small"
    refused(r"task\.subset: found 'smal' \(did you mean \"small\"\?\)", tmp_path, subset="smal")
    refused(r"task\.subset: .* expected none beside a file", tmp_path / "small" / "train.csv", subset="x")


def test_shards_are_joined_in_order_and_must_be_complete(tmp_path: Path) -> None:
    write(tmp_path / "train-00001-of-00002.parquet", [{"text": "b", "label": 1}])
    refused("found 1 of the 2 files of the split train", tmp_path)
    write(tmp_path / "train-00000-of-00002.parquet", [{"text": "a", "label": 0}])
    assert read(tmp_path)["train"].texts == [["a", "b"]]
    write(tmp_path / "train.csv")
    refused("expected one file for the split train", tmp_path)


def test_shards_with_other_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", [{"text": "a", "label": 0}])
    write(tmp_path / "train-00001-of-00002.parquet", [{"text": "a", "class": 0}])
    refused("the files differ in their columns", tmp_path)


def test_digits_and_null_words_in_csv_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n007,0\nnull,1\n"a\nb",1\n')
    assert read(tmp_path / "a.csv")["train"].texts == [["007", "null", "a\nb"]]


def test_declared_class_names_are_kept(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    datasets.Dataset.from_list(ROWS, features=features).to_parquet(tmp_path / "train.parquet")
    assert read(tmp_path)["train"].label_names == ["z", "a"]


def test_glue_folder_is_the_glue_task(tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": 2}]
    for name in ("train", "validation_matched", "validation_mismatched"):
        write(tmp_path / "glue" / "mnli" / f"{name}.parquet", rows)
    config = TaskConfig(dataset=str(tmp_path / "glue"), subset="mnli")
    source = find_source(config)
    assert (source.name, source.kind) == ("glue/mnli", "sequence-classification")
    assert read_splits(source)["validation"].where.endswith("validation_matched.parquet")
    assert find_source(TaskConfig(dataset=str(tmp_path / "glue" / "mnli"))) == source


def test_a_folder_of_a_glue_name_elsewhere_is_no_glue_task(tmp_path: Path) -> None:
    write(tmp_path / "rte" / "train.csv")
    with pytest.raises(InputError, match=r"task\.kind: missing"):
        find_source(TaskConfig(dataset=str(tmp_path / "rte")))


def test_kind_and_columns_are_needed_beyond_glue(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    refused(r"task\.kind: missing; expected one of sequence-classification, regression", path, kind=None)
    refused(r"task\.columns: missing; expected \{text", path, columns=None)


def test_glue_conflicts_and_unknown_names() -> None:
    refused(
        r"task\.kind: found 'regression'; expected 'sequence-classification' for glue/rte",
        "glue/rte",
        kind="regression",
    )
    refused(r"task\.dataset: found GLUE task 'mrcp' \(did you mean \"mrpc\"", "glue/mrcp")
    refused(r"task\.subset: found 'rte'; expected none beside glue/rte", "glue/rte", subset="rte")


@pytest.mark.parametrize("dataset", ["nowhere.csv", "/nowhere/at/all", "./nowhere", "a/b/c"])
def test_missing_path(dataset: str) -> None:
    refused(r"task\.dataset: .*: no such file or folder", dataset)


def test_unknown_file_type_and_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    refused(r"a\.xlsx: found file type '\.xlsx'; expected one of \.parquet, \.jsonl, \.csv", tmp_path / "a.xlsx")
    refused(r"found a\.xlsx; expected train\.parquet", tmp_path)


def test_files_of_no_split_and_missing_train(tmp_path: Path) -> None:
    write(tmp_path / "validation.csv")
    refused("found no split train; there are: validation", tmp_path)
    write(tmp_path / "train.csv")
    write(tmp_path / "testing.csv")
    refused(r"found testing\.csv; expected only files named train, validation and test", tmp_path)
    (tmp_path / "testing.csv").rename(tmp_path / "dev.csv")
    refused("found both dev and validation|found both validation and dev", tmp_path)


def test_missing_column_names_those_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    refused(
        r"task\.columns\.text: .*a\.csv: found no column 'txt' \(did you mean \"text\"\?\); there are: text, label",
        path,
        columns={"text": ["txt"], "label": "label"},
    )
    refused(
        r"task\.columns\.label: .* found no column 'y'.*there are: text, label", path, columns={**COLUMNS, "label": "y"}
    )


def test_a_test_split_without_labels_is_read_without(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    write(tmp_path / "test.csv", [{"text": "a"}])
    assert read(tmp_path)["test"].labels is None
    write(tmp_path / "validation.csv", [{"text": "a"}])
    refused(r"validation\.csv: found no column 'label'", tmp_path)


def test_missing_and_wrong_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, {"label": 1}])
    refused(r"task\.columns\.text: .*a\.jsonl: column 'text', row 2: found no text", path)
    refused("column 'label': found int64; expected text", path, columns={"text": ["label"], "label": "label"})


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_empty_split(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), path)
    else:
        path.write_text("" if suffix == ".jsonl" else "text,label\n")
    refused("the split train is empty; expected at least one row", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", "no parquet", "a.parquet: not a parquet file"),
        ("a.parquet", "", "a.parquet: the file is empty"),
        ("a.csv", "", "a.csv: the file is empty"),
        ("a.csv", "text,label\na,1,2\n", "a.csv: not a csv file: .*Expected 2 columns, got 3"),
        ("a.csv", "text,text,label\na,b,1\n", "found 2 columns 'text'; expected one"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text"\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: found list; expected a JSON object"),
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n{"text": "a", "label": "b"}\n',
            "column 'label': found values of types",
        ),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    refused(message, tmp_path / name)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    refused(r"a\.csv: not a csv file", tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff", "label": 1}\n')
    refused(r"a\.jsonl:1: not JSON", tmp_path / "a.jsonl")


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "extra": datasets.Value("int64"),
            "label": datasets.ClassLabel(names=["n", "p"]),
        }
    )
    rows = datasets.Dataset.from_list([{**row, "extra": 1} for row in ROWS], features=features)
    asked = []

    def load(identifier: str, subset: str | None) -> datasets.DatasetDict:
        asked.append((identifier, subset))
        return datasets.DatasetDict({"train": rows, "test": rows, "unsupervised": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = read("owner/reviews", subset="small")
    assert asked == [("owner/reviews", "small")]
    assert list(splits) == ["train", "test"]
    assert splits["train"].texts == [["one", "two, or"]]
    assert splits["train"].label_names == ["n", "p"]
    refused(
        r"owner/reviews, split train: found no column 'txt'.*there are: text, label, extra",
        "owner/reviews",
        columns={"text": ["txt"], "label": "label"},
    )


def test_glue_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"sentence1": "a", "sentence2": "b", "label": 0}])
    asked = []

    def load(identifier: str, subset: str | None) -> datasets.DatasetDict:
        asked.append((identifier, subset))
        return datasets.DatasetDict({"train": rows, "validation": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    read_splits(find_source(TaskConfig(dataset="glue/rte")))
    assert asked == [("nyu-mll/glue", "rte")]


def test_hub_miss_is_one_line() -> None:
    refused(r"task\.dataset: owner/nothing: no such file or folder here, and not loaded from the hub", "owner/nothing")
