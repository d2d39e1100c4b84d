"""What the arguments and the configuration alone can tell is refused before torch or transformers are imported."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest

from irdscale.cli import command_line
from irdscale.cli.app import VERB_KEYS
from tests.cli.test_command_line import HEAVY

pytestmark = pytest.mark.usefixtures("process_restored")
COLUMNS = "columns: {text: text, label: label}"
READERS = [verb for verb in VERB_KEYS if verb not in ("report", "bench", "init", "help", "schema")]
WITH_DATA = [verb for verb in READERS if verb != "plan"]
OWN = {"evaluate": ["adapter=made"], "export": ["adapter=made", "to=new"], "doctor": [], "plan": []}


def is_heavy(value: Any) -> bool:
    names = (getattr(value, "__module__", None), getattr(value, "__name__", None))
    return any(isinstance(name, str) and name.partition(".")[0] in HEAVY for name in names)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data, an adapter and masks, in which no heavy package can be imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 0}\n')
    for file in ("made/adapter.json", "run/adapter/adapter.json", "run/mask/mask.json", "search/masks/a/mask.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("{}")
    for number in ("a", "b"):
        (tmp_path / "many/masks" / number).mkdir(parents=True)
        (tmp_path / "many/masks" / number / "mask.json").write_text("{}")
    (tmp_path / "many/result.json").write_text('{"best": {"mask": "masks/b"}}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    write(tmp_path)
    # Modules of irdscale that hold something of a heavy package are imported anew, if at all.
    for name, module in list(sys.modules.items()):
        if name.startswith("irdscale.") and any(is_heavy(each) for each in vars(module).values()):
            monkeypatch.delitem(sys.modules, name)
    plain = builtins.__import__

    def guarded(name: str, *arguments: Any, **named: Any) -> Any:
        if name.partition(".")[0] in HEAVY:
            raise AssertionError(f"{name} is imported before the refusal")
        return plain(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", guarded)
    return tmp_path


def write(folder: Path, task: str = f"kind: sequence-classification, {COLUMNS}", more: str = "") -> None:
    (folder / "my.yaml").write_text(f"model: {{path: some/model}}\ntask: {{dataset: ./a.jsonl, {task}}}\n{more}")


def refused(capsys: pytest.CaptureFixture[str], verb: str, *arguments: str) -> str:
    assert command_line.run([verb, "my.yaml", *OWN.get(verb, []), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    return err.removeprefix("irdscale: ").rstrip("\n")


@pytest.mark.parametrize("verb", READERS)
def test_the_kind_and_the_columns_are_needed(verb: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, COLUMNS)
    assert refused(capsys, verb).startswith("task.kind: missing; expected one of sequence-classification, ")
    write(folder, "kind: regression")
    if verb in WITH_DATA:
        assert refused(capsys, verb).startswith("task.columns: missing; expected {text: .., label: ..}")
    write(folder)
    assert refused(capsys, verb, "model.path=./none") == f"model.path: {folder}/none: no such folder"
    assert refused(capsys, verb, "adaptr=x").startswith("command line: adaptr: unknown key")
    assert refused(capsys, verb, "search.ratio=0.1", "search.ratio=0.2") == "command line: search.ratio: given twice"


@pytest.mark.parametrize("verb", WITH_DATA)
def test_the_data_are_needed(verb: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, verb, "task.dataset=./none") == f"task.dataset: {folder}/none: no such file or folder"
    mixed = "task.pool.mixed_with={dataset: ./b.jsonl, share: 0.5}"
    assert refused(capsys, verb, mixed).startswith("task.pool.mixed_with.dataset: ")
    write(folder, "metric: pearson")
    found = refused(capsys, verb, "task.dataset=glue/rte")
    assert found.startswith(
        "task.metric: found 'pearson' with kind 'sequence-classification'; expected one of accuracy"
    )


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("train", ["mask=none"], "none/mask.json: cannot read the mask: No such file or directory"),
        ("evaluate", ["adapter=none"], "none/adapter.json: cannot read the adapter: No such file or directory"),
        ("predict", ["adapter=full"], "full/adapter.json: cannot read the adapter: No such file or directory"),
        (
            "train",
            ["mask=many"],
            "mask: found 2 masks in many/masks; expected mask=many/masks/b, which is the winner's, or another",
        ),
        ("predict", ["input=a.jsonl", "text=x"], "text: found text= beside input=; expected one of them"),
        ("predict", ["input=none.csv"], "none.csv: input: no such file; expected a file"),
        ("predict", ["to=a.jsonl"], "to: a.jsonl exists, and holds no predictions; expected a new file, or one of"),
        ("evaluate", ["adapter=made", "to=full"], "to: full is a folder; expected a new file, or one of predictions"),
        ("export", ["adapter=made", "to=full"], "to: full exists; expected a new or empty folder"),
        (
            "export",
            ["adapter=made", "to=new", "format=shirra"],
            "format: found 'shirra' (did you mean \"shira\"?); expected merged or shira",
        ),
        ("search", ["train.deepspeed=./none.json"], "train.deepspeed: "),
        ("compare", ["compare.methods=[fish_best]"], "compare.methods: found fish_best without ird; expected both"),
        (
            "compare",
            ["compare.variants={x: [ird, search.ratio=2]}"],
            "command line: compare.variants.x: search.ratio: ",
        ),
        ("plan", ["gpu=h100", "train.steps=3"], "gpu: found 'h100' (did you mean \"h100-80gb\"?)"),
        ("plan", ["node=2"], 'command line: node: unknown key (did you mean "nodes"?)'),
        ("plan", ["gpus=2"], "command line: gpus: unknown key"),
        ("plan", ["nodes=two"], "nodes: found 'two'; expected a number of at least 1"),
        ("plan", ["nodes=0"], "nodes: found '0'; expected a number of at least 1"),
        ("plan", ["nodes=1", "nodes=2"], "nodes: given twice"),
        (
            "search",
            ["learning_rate=1"],
            'command line: learning_rate: unknown key (did you mean "train.learning_rate"?)',
        ),
        ("search", ["mask=x"], "command line: mask: unknown key of irdscale search (irdscale train takes it)"),
        ("predict", ["imput=x"], 'command line: imput: unknown key (did you mean "input"?)'),
    ],
)
def test_wrong_arguments(
    verb: str,
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(OWN, verb, [])
    assert refused(capsys, verb, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("what", "given", "found"),
    [
        ("adapter", "made", "made"),
        ("adapter", "run", "run/adapter"),
        ("adapter", "owner/name", "owner/name"),
        ("mask", "run", "run/mask"),
        ("mask", "run/mask", "run/mask"),
        ("mask", "search", "search/masks/a"),
    ],
)
def test_a_run_names_its_adapter_and_its_only_mask(what: Any, given: str, found: str, folder: Path) -> None:
    from irdscale.cli.made_by_runs import find_made

    assert find_made(what, given) == found
