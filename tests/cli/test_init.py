"""The verb `init`: the configuration that it writes loads, and its data fit the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from irdscale.cli import command_line
from irdscale.config.loader import load_config
from irdscale.distributed.deepspeed import micro_batch
from tests.helpers import tiny_model

pytestmark = pytest.mark.usefixtures("process_restored")
ROWS = 60


def rows_of(kind: str) -> list[dict[str, Any]]:
    def row(i: int) -> dict[str, Any]:
        said, asked = f"the dog said {i}", f"was it a dog {i}"
        talk = [("user", asked), ("assistant", said)]
        kinds: dict[str, dict[str, Any]] = {
            "classes": {"text": said, "label": ("good", "bad")[i % 2]},
            "pairs": {"sentence1": asked, "sentence2": said, "label": i % 2},
            "values": {"text": said, "score": i / 7},
            "texts": {"text": said},
            "answers": {"question": asked, "answer": said},
            "alpaca": {"instruction": asked, "input": "" if i % 3 else f"a film {i}", "output": said},
            "messages": {"messages": [{"role": role, "content": text} for role, text in talk]},
            "sharegpt": {"conversations": [{"from": {"user": "human"}.get(r, "gpt"), "value": t} for r, t in talk]},
            "choices": {"question": asked, "choices": ["a dog", "a man", "a film"], "answer": i % 3},
        }
        return kinds[kind]

    return [row(i) for i in range(ROWS)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        lines = [";".join(rows[0]), *(";".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama", folder / "llama", causal=True)
    tiny_model("bert", folder / "bert")
    return {name: folder / name for name in ("llama", "bert")}


def written(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    capsys.readouterr()
    assert command_line.run(["init", *arguments]) == 0
    out, err = capsys.readouterr()
    return out, err


@pytest.mark.parametrize(
    ("file", "rows", "model", "kind"),
    [
        ("a.jsonl", "classes", "bert", "sequence-classification"),
        ("a.csv", "classes", "llama", "sequence-classification"),
        ("a.parquet", "pairs", "bert", "sequence-classification"),
        ("a.jsonl", "values", "bert", "regression"),
        ("a.parquet", "texts", "llama", "causal-lm"),
        ("a.csv", "answers", "llama", "sft"),
        ("a.json", "alpaca", "llama", "sft"),
        ("a.jsonl", "messages", "llama", "sft"),
        ("a.json", "sharegpt", "llama", "sft"),
        ("a.jsonl", "choices", "llama", "multiple-choice"),
    ],
)
def test_the_written_configuration_loads_and_reads_its_data(
    file: str,
    rows: str,
    model: str,
    kind: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / file, rows_of(rows))
    out, err = written(capsys, "--data", file, "--model", str(models[model]))
    assert f"Assumed: task.kind is {kind}: " in err
    assert f"Read {ROWS} rows of {file}: " in err
    # The file may lie anywhere: its paths are absolute.
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "my.yaml"
    path.write_text(out)
    config = load_config(path)
    assert config.task.kind == kind
    assert config.output == "runs/a"
    assert micro_batch(config, 1) >= 1
    assert all("#" in line or line.endswith(":") for line in out.splitlines() if "chat_template" not in line), out
    assert config.task.truncate is None
    assert command_line.run(["data", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["refused"]["rows"] == 0
    assert all(split["tokens"]["cut"] == 0 for split in found["splits"].values())
    assert config.fisher.samples <= found["splits"]["train"]["samples"]


def test_without_a_model_the_loader_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", rows_of("answers"))
    out, err = written(capsys, "--data", "a.jsonl")
    assert "Assumed: model.path is empty: fill in a decoder, or give --model." in err
    (tmp_path / "my.yaml").write_text(out)
    assert command_line.run(["search", "my.yaml"]) == 2
    expected = (
        "my.yaml:6: model.path: found nothing; expected a local folder, a hub id, a GGUF file or package:NAME/FOLDER"
    )
    assert capsys.readouterr().err == f"irdscale: {expected}\n"
    # Values as those of configs/llm.
    values = yaml.safe_load(out)
    assert values["model"]["dtype"] == "bfloat16"
    assert load_config("my.yaml", ["model.path=m"]).train.learning_rate == 1e-3


def test_what_the_user_gives_is_taken(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", rows_of("answers"))
    given = ["task.max_length=48", "train.steps=7", "task.limit.train=20", "fisher.samples=16", "output=runs/x"]
    out, err = written(capsys, "--data", "a.jsonl", "--task", "causal-lm", "task.columns.text=answer", *given)
    (tmp_path / "my.yaml").write_text(out)
    config = load_config("my.yaml", ["model.path=m"])
    assert config.task.columns is not None
    assert (config.task.kind, config.task.columns.text) == ("causal-lm", ["answer"])
    assert (config.task.max_length, config.task.limit.train, config.fisher.samples) == (48, 20, 16)
    assert (config.train.steps, config.train.epochs, config.output) == (7, None, "runs/x")
    assert "max_length is" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data: missing; expected --data FILE"),
        (["a.jsonl"], "command line: found 'a.jsonl'; expected --data a.jsonl"),
        (["--data", "b.jsonl"], "b.jsonl: --data: no such file or folder; expected a local one"),
        (["--data", "a.jsonl", "--task", "stf"], "--task: found 'stf' (did you mean \"sft\"?); expected one of"),
        (["--data", "a.jsonl", "--model", "./none"], "model.path: ./none: no such folder"),
        (["--data", "a.jsonl", "train.step=1"], 'irdscale init: train.step: unknown key (did you mean "steps"?)'),
        (["--data", "a.jsonl", "trian.steps=1"], 'command line: trian: unknown key (did you mean "train"?)'),
        (["--data", "a.jsonl", "--model", "BERT"], "--model: found an encoder"),
        (["--data", "stars.jsonl"], "--task sequence-classification (3 classes in 'stars'); --task regression"),
        (["--data", "few.jsonl"], "few.jsonl: --data: found 9 rows; expected 20 or more"),
        (["--data", "a.xlsx"], "found file type '.xlsx'"),
    ],
)
def test_what_cannot_be_decided_or_read_is_one_line(
    arguments: list[str],
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", rows_of("answers"))
    write(tmp_path / "few.jsonl", rows_of("answers")[:9])
    write(tmp_path / "stars.jsonl", [{"text": f"a b {i}", "stars": i % 3} for i in range(ROWS)])
    (tmp_path / "a.xlsx").write_text("x")
    assert command_line.run(["init", *[str(models["bert"]) if word == "BERT" else word for word in arguments]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_long_prompts_are_cut_where_the_model_ends(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = rows_of("answers")
    rows[5]["question"] = "a dog " * 3000
    write(tmp_path / "a.jsonl", rows)
    out, err = written(capsys, "--data", "a.jsonl", "--model", str(models["llama"]))
    (tmp_path / "my.yaml").write_text(out)
    positions = json.loads((models["llama"] / "config.json").read_bytes())["max_position_embeddings"]
    config = load_config("my.yaml")
    assert (config.task.max_length, config.task.truncate) == (min(4096, positions), "left")
    assert "Assumed: task.truncate is left" in err
    assert command_line.run(["data", "my.yaml"]) == 0


def test_a_folder_of_splits_and_a_glue_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("train", "validation"):
        write(tmp_path / "mine" / f"{name}.jsonl", rows_of("classes"))
    out, _ = written(capsys, "--data", "mine", "model.path=m")
    (tmp_path / "my.yaml").write_text(out)
    assert load_config("my.yaml").task.dataset == str(tmp_path / "mine")
    out, _ = written(capsys, "--data", "glue/rte", "--model", "some/model", "--json")
    found = json.loads(out)
    assert "task.kind" not in found["config"]
    (tmp_path / "my.yaml").write_text(found["yaml"])
    assert load_config("my.yaml").task.dataset == "glue/rte"
