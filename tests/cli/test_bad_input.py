"""Every mistake of a user: exit code 2, one line that names it, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale import Mask, save_adapter, sparsify
from irdscale.cli import command_line
from irdscale.config.loader import load_config
from irdscale.models.build import build_model
from irdscale.tasks import load_task
from tests.helpers import tiny_model, tiny_tokenizer
from tests.search.toy import write_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with a mask and an adapter that fit it."""
    folder = tmp_path_factory.mktemp("base")
    config = load_config(write_config(folder))
    model, _ = build_model(config, load_task(config), 0)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    name = "bert.pooler.dense.weight"
    mask = Mask({name: torch.tensor([0, 7], dtype=torch.int32)}, {name: shapes[name]})
    mask.save(folder / "mask")
    sparsify(model, mask, always_train=["^classifier"])
    save_adapter(model, folder / "adapter")
    return folder


@pytest.fixture
def toy(base: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    folder = tmp_path / "toy"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("out"))
    write_config(folder)
    return folder


def rewrite(path: Path, change: Any) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(row) for row in change(rows)) + "\n")


def relabel(toy: Path, label: Any) -> None:
    rewrite(toy / "data/validation.jsonl", lambda rows: [*rows[:5], {**rows[5], "label": label}, *rows[6:]])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def swap_model(toy: Path, **options: Any) -> None:
    shutil.rmtree(toy / "model")
    tiny_model("bert", toy / "model", **options)


def strip_tokens(toy: Path) -> None:
    for file in toy.glob("model/*token*"):
        file.unlink()
    tiny_tokenizer(toy / "model", special={})


def poison(toy: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = toy / "model/model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    tensors[key][:] = float("nan")
    save_file(tensors, file, {"format": "pt"})


CASES: list[tuple[str, str, list[str], Any, str]] = [
    ("unknown key", "search", ["search.ratoi=1"], None, r'search.ratoi: unknown key \(did you mean "ratio"\?\)'),
    ("wrong type", "search", ["search.seeds=zero"], None, "search.seeds: found 'zero'"),
    ("ratio 0", "search", ["search.ratio=0"], None, "search.ratio: found 0; expected greater than 0"),
    (
        "ratio above 1",
        "search",
        ["search.ratio=1.5"],
        None,
        "search.ratio: found 1.5; expected less than or equal to 1",
    ),
    ("k below 1", "search", ["search.ratio=1e-6", "search.min_ratio=null"], None, "which gives 0 of 8482 parameters"),
    ("N too large", "search", ["fisher.samples=65"], None, "fisher.samples: found 65; expected at most 64"),
    ("missing data", "search", ["task.dataset=./none"], None, "task.dataset: .*none"),
    ("missing model", "search", ["model.path=./none"], None, "model.path: .*none: no such folder"),
    ("no model", "search", [], lambda toy: (toy / "model/config.json").unlink(), "not a model folder"),
    ("missing column", "search", ["task.columns={text: [txt], label: label}"], None, "txt.*text"),
    ("empty split", "search", [], lambda toy: rewrite(toy / "data/test.jsonl", lambda rows: []), "empty"),
    ("label out of range", "search", [], lambda toy: relabel(toy, 7), "row 5.*7"),
    ("no label", "search", [], lambda toy: relabel(toy, None), "row 5"),
    ("no pad token", "search", [], strip_tokens, "neither a pad token nor an end-of-sequence token"),
    ("NaN in the loss", "search", [], poison, r"sample \d+ \(row \d+ of its split\): found a loss of nan"),
    ("NaN in fisher", "fisher", [], poison, r"sample \d+ \(row \d+ of its split\): found a loss of nan"),
    ("no adapter", "evaluate", ["adapter=none"], None, "none/adapter.json: cannot read the adapter"),
    ("other base", "evaluate", ["adapter=adapter"], lambda toy: swap_model(toy, seed=3), "adapter for another base"),
    ("other base", "export", ["adapter=adapter", "to=merged"], lambda toy: swap_model(toy, seed=3), "another base"),
    (
        "broken adapter",
        "evaluate",
        ["adapter=adapter"],
        lambda toy: flip(toy / "adapter/adapter.safetensors"),
        "damaged",
    ),
    ("no mask", "train", ["mask=none"], None, "none/mask.json: cannot read the mask"),
    ("broken mask", "train", ["mask=mask"], lambda toy: flip(toy / "mask/mask.safetensors"), "damaged mask"),
    ("mask of another model", "train", ["mask=mask"], lambda toy: swap_model(toy, hidden_size=32), "found shape"),
    ("no search", "report", [], lambda toy: (toy / "out").mkdir(), "expected a finished one: run irdscale search"),
]


@pytest.mark.parametrize(
    ("name", "verb", "arguments", "change", "message"), CASES, ids=[f"{c[1]}: {c[0]}" for c in CASES]
)
def test_one_line_and_exit_2(
    name: str,
    verb: str,
    arguments: list[str],
    change: Any,
    message: str,
    toy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(toy)
    if change is not None:
        change(toy)
    before = {path.relative_to(toy) for path in toy.rglob("*")}
    capfd.readouterr()
    assert command_line.run([verb, "toy.yaml", *arguments]) == 2, name
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("irdscale: ")]
    assert len(lines) == 1
    import re

    assert re.search(message, lines[0]), lines[0]
    assert {path.relative_to(toy) for path in toy.rglob("*")} == before


def test_read_only_and_full_output(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(toy)
    (toy / "file").write_text("")
    assert command_line.run(["search", "toy.yaml", "output=file/out"]) == 2
    assert "output: found" in capfd.readouterr().err
    assert (toy / "file").read_text() == ""
