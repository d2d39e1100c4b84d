"""Reading local files and folders and hub data sets, and what is said of those that do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from irdscale.config.task import TaskConfig
from irdscale.errors import InputError
from irdscale.tasks import data
from irdscale.tasks.data import read_splits
from irdscale.tasks.sources import find_source

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
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
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


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
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


def named(path: Path, names: list[str], labels: list[int]) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    data = {"text": [f"film {label}" for label in labels], "label": labels}
    datasets.Dataset.from_dict(data, features=features).to_parquet(path)


@pytest.mark.parametrize(
    ("names", "labels", "expected", "called"),
    [
        ([["z", "a"], ["a", "z"]], [[0, 1], [0, 1, -1]], [0, 1, 1, 0, -1], ["z", "a"]),
        ([["z", "a"], ["b", "a"]], [[0, 1], [0, 1]], [0, 1, 2, 1], ["z", "a", "b"]),
        ([["0", "1"], ["pos", "neg"], ["neg", "pos"]], [[0, 1], [0, 1], [0, 1]], [0, 1, 0, 1, 1, 0], ["pos", "neg"]),
    ],
)
def test_shards_that_name_their_classes_in_another_order(
    tmp_path: Path, names: list[list[str]], labels: list[list[int]], expected: list[int], called: list[str]
) -> None:
    for shard, (own, numbers) in enumerate(zip(names, labels, strict=True)):
        named(tmp_path / f"train-{shard:05}-of-{len(names):05}.parquet", own, [max(0, n) for n in numbers])
        if -1 in numbers:
            rows = pq.read_table(tmp_path / f"train-{shard:05}-of-{len(names):05}.parquet")
            rows = rows.set_column(1, "label", pa.array(numbers, pa.int64()))
            pq.write_table(rows, tmp_path / f"train-{shard:05}-of-{len(names):05}.parquet")
    split = read(tmp_path)["train"]
    assert (split.labels, split.label_names) == (expected, called)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train": "0 1 10"}, [0, 1, 10]),
        ({"train": "00 01 10"}, ["00", "01", "10"]),
        ({"train": "1.0 0.0 1.0"}, ["1.0", "0.0", "1.0"]),
        ({"train": "2024-01-02 2024-01-03 2024-01-02"}, ["2024-01-02", "2024-01-03", "2024-01-02"]),
        ({"train": "true false true"}, ["true", "false", "true"]),
        ({"train": "NA GB GB"}, ["NA", "GB", "GB"]),
        ({"train": "0 NA 1"}, [0, None, 1]),
        ({"train": "1 x 0"}, ["1", "x", "0"]),
        ({"train": "10 11 12", "test": "01 10 11"}, ["10", "11", "12"]),
        ({"train": "10 11 12", "test": "-1 -1 -1"}, [10, 11, 12]),
        ({"train": "a b b", "test": "NA NA NA"}, ["a", "b", "b"]),
        ({"train": "1 12345678901234567890 2"}, ["1", "12345678901234567890", "2"]),
    ],
)
def test_labels_of_csv_files_are_text_unless_all_are_plain_integers(
    tmp_path: Path, files: dict[str, str], expected: list[Any]
) -> None:
    for split, labels in files.items():
        lines = [f"film {row},{label}" for row, label in enumerate(labels.split())]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    splits = read(tmp_path)
    assert splits["train"].labels == expected
    if "test" in files:
        own: list[Any] = files["test"].split()
        assert splits["test"].labels == ([None] * 3 if own[0] == "NA" else [-1] * 3 if own[0] == "-1" else own)


def test_numbers_of_a_regression_stay_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,01.50\nb,2\n")
    found = read_splits(find_source(TaskConfig(dataset=str(tmp_path / "a.csv"), kind="regression", columns=COLUMNS)))
    assert found["train"].labels == [1.5, 2.0]


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


def test_json_files_of_lines_and_of_other_things(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read(path)["train"].labels == [0, 1]
    for text, message in (
        ("{}", "a.json: task.dataset: found dict; expected a list of JSON objects"),
        ("[1]", "a.json, row 0: task.dataset: found int; expected a JSON object"),
        ("[1", "a.json: task.dataset: not JSON: "),
        (" ", "a.json: task.dataset: the file is empty"),
    ):
        path.write_text(text)
        refused(re.escape(message), path)


def test_json_that_describes_a_folder_is_no_split(tmp_path: Path) -> None:
    write(tmp_path / "train.json")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert list(read(tmp_path)) == ["train"]


@pytest.mark.parametrize(("delimiter", "shown"), [(";", "';'"), ("\t", "tab"), ("|", "'|'")])
def test_a_csv_of_another_delimiter_names_it(tmp_path: Path, delimiter: str, shown: str) -> None:
    path = write(tmp_path / "a.csv")
    path.write_text(path.read_text().replace('",', f'"{delimiter}').replace("text,label", f"text{delimiter}label"))
    expected = f"a.csv: task.delimiter: found columns that {shown} parts, not ','; expected task.delimiter={shown}"
    refused(re.escape(expected), path)
    assert read(path, delimiter=delimiter)["train"].labels == [0, 1]
    # A row that a comma parts unevenly is an error of the reader.
    path.write_text(path.read_text() + f'"x, y, z"{delimiter}1\n' + f"p, q{delimiter}1\n")
    refused(re.escape(expected), path)


def test_a_tsv_has_tabs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\none, or\t0\nx\t1\n")
    assert read(tmp_path / "a.tsv")["train"].labels == [0, 1]
    write(tmp_path / "b.csv").rename(tmp_path / "b.tsv")
    expected = "b.tsv: task.delimiter: found columns that ',' parts, not tab; expected task.delimiter=','"
    refused(re.escape(expected), tmp_path / "b.tsv")


def test_unknown_file_type_and_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    refused(
        r"a\.xlsx: task\.dataset: found file type '\.xlsx'; expected one of \.parquet, \.jsonl, \.json, \.csv, \.tsv",
        tmp_path / "a.xlsx",
    )
    refused(r"found a\.xlsx; expected train\.parquet", tmp_path)


def test_files_of_no_split_and_missing_train(tmp_path: Path) -> None:
    write(tmp_path / "validation.csv")
    refused("found the splits validation; expected a split train", tmp_path)
    write(tmp_path / "train.csv")
    write(tmp_path / "testing.csv")
    refused(r"found testing\.csv; expected only files named train, validation and test", tmp_path)
    (tmp_path / "testing.csv").rename(tmp_path / "dev.csv")
    refused("found both dev and validation|found both validation and dev", tmp_path)


def test_missing_column_names_those_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    refused(
        r"a\.csv: task\.columns\.text: found no column 'txt' \(did you mean \"text\"\?\); expected one of text, label",
        path,
        columns={"text": ["txt"], "label": "label"},
    )
    refused(
        r"task\.columns\.label: found no column 'y'; expected one of text, label",
        path,
        columns={**COLUMNS, "label": "y"},
    )


def test_a_test_split_without_labels_is_read_without(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    write(tmp_path / "test.csv", [{"text": "a"}])
    assert read(tmp_path)["test"].labels is None
    write(tmp_path / "validation.csv", [{"text": "a"}])
    refused(r"validation\.csv: task\.columns\.label: found no column 'label'", tmp_path)


def test_missing_and_wrong_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, {"label": 1}])
    refused(r"a\.jsonl: column 'text', row 2: task\.columns\.text: found no text", path)
    refused(
        "column 'label': task.columns.text: found int64; expected text",
        path,
        columns={"text": ["label"], "label": "label"},
    )


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
        ("a.parquet", "no parquet", "a.parquet: task.dataset: not a parquet file"),
        ("a.parquet", "", "a.parquet: task.dataset: the file is empty"),
        ("a.csv", "", "a.csv: task.dataset: the file is empty"),
        ("a.csv", "text,label\na,1,2\n", "a.csv: task.dataset: not a csv file: .*Expected 2 columns, got 3"),
        ("a.csv", "text,text,label\na,b,1\n", "found 2 columns 'text'; expected one"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text"\n', "a.jsonl:2: task.dataset: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: task.dataset: found list; expected a JSON object"),
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n{"text": "a", "label": "b"}\n',
            "column 'label': task.dataset: found values of types",
        ),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    refused(message, tmp_path / name)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    refused(r"a\.csv: task\.dataset: not a csv file", tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff", "label": 1}\n')
    refused(r"a\.jsonl:1: task\.dataset: not JSON", tmp_path / "a.jsonl")


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
        r"owner/reviews, split train: task\.columns\.text: found no column 'txt'.*expected one of text, label, extra",
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
    refused(r"owner/nothing: task\.dataset: no such file or folder here, and not loaded from the hub", "owner/nothing")
