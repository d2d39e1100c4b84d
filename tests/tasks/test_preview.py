"""What the verb data shows: classes, lengths, learned tokens, and refused rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from irdscale.cli import command_line, samples
from irdscale.config.loader import load_config
from irdscale.errors import InputError
from irdscale.tasks import load_task, tell_classes
from irdscale.tasks.preview import run_data, token_texts
from tests.helpers import tiny_model
from tests.tasks.test_chats import CHATML, tokenizer

PAIRS = {"prompt": "q", "completion": "a"}
SFT = {"kind": "sft", "columns": PAIRS}
REVIEWS = {"kind": "sequence-classification", "columns": {"text": ["text"], "label": "y"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations and tokenizers, without weights."""
    folder = tmp_path_factory.mktemp("models")
    for family, causal in (("bert", False), ("llama", True)):
        tiny_model(family, folder / family, causal=causal)  # type: ignore[arg-type]
        (folder / family / "model.safetensors").unlink()
    return folder


def made(folder: Path, model: Path, rows: list[dict[str, Any]], **task: Any) -> str:
    """A configuration with these rows as every split."""
    (folder / "data").mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"path": str(model)},
        "task": {"dataset": str(folder / "data"), "max_length": 12, **task},
        "fisher": {"samples": 1},
        "search": {"min_samples": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


def data(config: str) -> dict[str, Any]:
    return run_data(load_config(config))


def test_classes_lengths_and_cut_samples(models: Path, tmp_path: Path) -> None:
    words = [1, 2, 3, 4, 5, 6, 10, 11, 40, 3]
    rows = [{"text": " ".join(["dog"] * count), "y": ("good", "bad")[i % 5 == 0]} for i, count in enumerate(words)]
    config = made(tmp_path, models / "bert", rows, **REVIEWS)
    result = data(config)
    train = result["splits"]["train"]
    lengths = [count + 2 for count in words]
    assert train["classes"] == {"bad": 2, "good": 8}
    assert train["tokens"] == {
        "median": int(np.median(lengths)),
        "p95": int(np.percentile(lengths, 95)),
        "longest": 42,
        "cut": 2,
        "cut_share": 0.2,
    }
    assert [(sample["row"], sample["label"]) for sample in train["shown"]] == [(0, "bad"), (4, "good"), (9, "good")]
    assert train["shown"][1]["tokens"] == ["[CLS]", *[" dog"] * 5, " [SEP]"]
    assert not any(train["shown"][1]["learned"])
    assert (result["longer_are"], result["refused"]["rows"]) == ("cut", 0)
    cut = load_task(load_config(config)).cut
    assert cut is not None
    assert (cut.count, cut.size) == (2, 10), "a text of exactly max_length tokens is not cut"


def test_numbers(models: Path, tmp_path: Path) -> None:
    rows = [{"text": "dog", "y": value} for value in (0.5, 2.0, 3.5)]
    config = made(tmp_path, models / "bert", rows, kind="regression", columns=REVIEWS["columns"])
    train = data(config)["splits"]["train"]
    assert train["values"] == {"smallest": 0.5, "median": 2.0, "largest": 3.5}
    assert [sample["label"] for sample in train["shown"]] == [0.5, 2.0, 3.5]


def test_learned_tokens_of_completions(models: Path, tmp_path: Path) -> None:
    rows = [{"q": "the dog", "a": "is good"}, {"q": "he", "a": "bad man"}]
    result = data(made(tmp_path, models / "llama", rows, **SFT))
    for name in ("train", "selection", "test"):
        first, second = result["splits"][name]["shown"]
        assert "".join(t for t, learned in zip(first["tokens"], first["learned"]) if learned) == " is good </s>"
        assert "".join(second["tokens"]) == "<s> he bad man </s>"
        assert result["splits"][name]["tokens"]["learned_share"] == pytest.approx(6 / 11)
    assert "classes" not in result["splits"]["train"]


def test_learned_tokens_of_chats(models: Path, tmp_path: Path) -> None:
    tokenizer(CHATML).save_pretrained(tmp_path / "chat")
    (tmp_path / "chat/config.json").write_text((models / "llama/config.json").read_text())
    chat = [{"role": r, "content": c} for r, c in [("user", "Where?"), ("assistant", "hello Bot"), ("user", "fine")]]
    rows = [{"m": [*chat, {"role": "assistant", "content": "Paris é"}]}]
    config = made(tmp_path, tmp_path / "chat", rows, kind="sft", columns={"messages": "m"}, max_length=200)
    (sample,) = data(config)["splits"]["train"]["shown"]
    learned = "".join(t for t, is_learned in zip(sample["tokens"], sample["learned"], strict=True) if is_learned)
    assert learned == "hello Bot<|im_end|>\nParis \N{REPLACEMENT CHARACTER}é<|im_end|>\n"


def test_right_choices_and_pieces_of_texts(models: Path, tmp_path: Path) -> None:
    columns = {"prompt": "q", "choices": ["c"], "label": "y"}
    rows = [{"q": "the dog", "c": ["is good", "bad"], "y": i % 3 == 0} for i in range(6)]
    rows = [{**row, "y": int(row["y"])} for row in rows]
    result = data(made(tmp_path, models / "llama", rows, kind="multiple-choice", columns=columns))
    assert result["splits"]["train"]["right_choices"] == {"0": 4, "1": 2}
    assert [sample["label"] for sample in result["splits"]["train"]["shown"]] == [1, 0, 0]
    rows = [{"text": "dog " * count} for count in (3, 30, 10)]
    (tmp_path / "texts").mkdir()
    config = made(
        tmp_path / "texts", models / "llama", rows, kind="causal-lm", columns={"text": ["text"]}, packing=True
    )
    result = data(config)
    train = result["splits"]["train"]
    assert train["tokens"]["longest"] == 32
    assert (train["samples"], train["tokens"]["cut"], result["longer_are"]) == (3, 1, "cut in pieces")
    assert train["blocks"] == (5 + 32 + 12) // 12
    cut = load_task(load_config(config)).cut
    assert cut is not None
    assert (cut.count, cut.size) == (1, 3)


def test_refused_rows_are_named_and_the_others_shown(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"q": "the dog", "a": "is good"} for _ in range(40)]
    rows[7]["a"] = rows[23]["a"] = " "
    rows[31]["q"] = "dog " * 20
    config = made(tmp_path, models / "llama", rows, **SFT)
    result = data(config)
    assert result["refused"]["rows"] == 9
    own = [each for each in result["refused"]["first"] if each["split"] == "train"]
    assert [each["row"] for each in own] == [7, 23, 31]
    assert "row 23: found no text" in own[1]["why"]
    assert f"train, row 31: found {20 + 4} tokens; expected at most 12" in own[2]["why"]
    assert result["splits"]["train"]["samples"] == 38
    assert command_line.run(["data", config]) == 2
    out, err = capsys.readouterr()
    assert "refused: 9 rows" in out
    assert err.startswith("irdscale: 9 rows refused; the first: ")
    assert "row 7" in err
    assert err.count("\n") == 1
    with pytest.raises(InputError, match="row 7"):
        load_task(load_config(config))


def test_many_refused_rows_are_not_all_looked_for(models: Path, tmp_path: Path) -> None:
    rows = [{"q": "the dog", "a": "good" if i < 3 else ""} for i in range(60)]
    result = data(made(tmp_path, models / "llama", rows, **SFT))
    assert result["refused"]["rows"] == 60
    assert result["splits"]["train"]["samples"] == 3
    assert result["refused"]["at_least"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [({"prompt": "question", "completion": "a"}, "found no column 'question'"), (PAIRS, "row 0: found no text")],
)
def test_what_is_wrong_with_all_rows_is_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, str], said: str
) -> None:
    config = made(tmp_path, models / "llama", [{"q": "the dog", "a": ""}] * 3, kind="sft", columns=columns)
    assert command_line.run(["data", config]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_cut_from_the_left(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"q": "dog " * count, "a": "good"} for count in (2, 8, 9, 20)]
    config = made(tmp_path, models / "llama", rows, **SFT, truncate="left")
    result = data(config)
    train = result["splits"]["train"]
    assert (result["longer_are"], result["refused"]["rows"]) == ("cut from the left", 0)
    assert (train["tokens"]["cut"], train["tokens"]["longest"]) == (1, 23)
    assert [len(sample["tokens"]) for sample in train["shown"]] == [5, 11, 12]
    shown: list[str] = []
    monkeypatch.setattr("irdscale.tasks.counts.say", shown.append)
    tell_classes(load_task(load_config(config)), True)
    assert shown == [
        "Longer than task.max_length (12 tokens): 1 of 4 samples of train (25 %); they are cut from the left"
    ]


def test_tokens_are_in_brackets_or_coloured(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made(tmp_path, models / "llama", [{"q": "the dog", "a": "is good"}] * 3, **SFT)
    assert command_line.run(["data", config]) == 0
    assert "row 0: <s>| the| dog|[ is| good| </s>]\n" in capsys.readouterr().out
    assert command_line.run(["data", config, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == data(config)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert command_line.run(["data", config]) == 0
    assert "row 0: <s>| the| dog|\x1b[1;32m is| good| </s>\x1b[0m" in capsys.readouterr().out


def test_what_a_terminal_acts_on_is_escaped_and_long_samples_are_shortened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "SHOWN", 2)
    sample = {"row": 4, "tokens": ["\x1b[31m", "\n", "b", "c", "d", "e"], "learned": [False] * 4 + [True] * 2}
    assert samples._sample(sample, False).plain == "  row 4: \\x1b[31m|\\n .. 2 tokens .. [d|e]"


@pytest.mark.parametrize("text", ["the good dog", "naïve café 漢字 🙂 ok", "  two  spaces\n\nlines"])
@pytest.mark.parametrize("name", ["llama", "stories260K", "chat"])
def test_token_texts_join_to_the_text(models: Path, name: str, text: str) -> None:
    root = Path(__file__).parents[2] / "configs/models"
    made = (
        tokenizer(CHATML)
        if name == "chat"
        else AutoTokenizer.from_pretrained(models / "llama" if name == "llama" else root / name)
    )
    ids = made(text)["input_ids"]
    joined = "".join(token_texts(made, ids)).replace("\N{REPLACEMENT CHARACTER}", "")
    assert joined == made.decode(ids, clean_up_tokenization_spaces=False)
