"""`irdscale help` and `irdscale schema`, the arguments in the help of verbs, and shell completion."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from irdscale.cli import command_line
from irdscale.cli.app import VERB_KEYS
from irdscale.cli.completion import complete_change, complete_key, complete_kind
from irdscale.config.keys import config_keys, editor_schema, key_names
from irdscale.config.schema import RunConfig

pytestmark = pytest.mark.usefixtures("process_restored")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command_line.run(["help", *arguments]) == 0
    return capsys.readouterr().out


def test_a_key_shows_meaning_values_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "train.learning_rate").splitlines() == [
        "train.learning_rate: Peak learning rate of AdamW, for masked entries and head.",
        "  values   number > 0",
        "  default  0.001",
    ]
    assert "values   'local', 'ray'" in shown(capsys, "search.runner")
    assert "default  required" in shown(capsys, "task.dataset")
    facts = json.loads(shown(capsys, "model.quantize", "--json"))
    assert (facts["values"], facts["default"]) == ("'nf4', 'int8'", "unset")
    # Keys that two sections share.
    assert shown(capsys, "task.pool.mixed_with.columns.label").startswith("task.pool.mixed_with.columns.label: Label")


def test_a_section_shows_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "search").splitlines()
    assert lines[:2] == ["search: a section", "  of the verb of this name: irdscale search --help"]
    assert lines[2].split() == ["key", "meaning"]
    assert {line.split()[0] for line in lines[3:]} == {
        k.name for k in config_keys() if k.name.startswith("search.")
    } - {"search.ray"}
    assert "[number > 0, <= 1; default 0.005]" in lines[3]
    every = shown(capsys)
    assert all(f"\n{key.name} " in every for key in config_keys() if not key.is_section)
    assert "[irdscale export, predict" not in every
    assert "[irdscale evaluate, export, predict]" in every


def test_an_argument_shows_the_verbs_that_take_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, "to")
    assert "taken by irdscale evaluate, irdscale export, irdscale predict" in found
    assert "New folder for the checkpoint" in found
    assert "File for the predictions" in found


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("serch", "search"),
        ("adaptr", "adapter"),
    ],
)
def test_a_wrong_key_names_the_nearest(key: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(["help", key]) == 2
    assert capsys.readouterr() == ("", f'irdscale: {key}: unknown key (did you mean "{near}"?)\n')


def test_the_schema_knows_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == editor_schema()
    assert list(schema["properties"]) == list(RunConfig.model_fields)
    assert schema["additionalProperties"] is False
    columns = schema["$defs"]["ColumnsConfig"]["properties"]
    assert {"type": "string"} in columns["text"]["anyOf"]
    # One text is no list where it is a word.
    assert len(schema["$defs"]["TrainConfig"]["properties"]["always_train"]["anyOf"]) == 2
    assert "task.pool.mixed_with.columns.text" in key_names()


@pytest.mark.parametrize("verb", [verb for verb, keys in VERB_KEYS.items() if keys])
def test_the_help_of_a_verb_lists_its_arguments(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run([verb, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for key in VERB_KEYS[verb]:
        assert words.count(key.usage) >= 2, f"{key.usage}: expected in the usage and among the arguments"
        assert key.meaning.rstrip(".").split()[-1] in words


def test_completion_offers_keys_arguments_and_kinds() -> None:
    keys = [name for name, _ in complete_change(SimpleNamespace(info_name="predict"), "")]
    assert keys[:4] == ["adapter=", "input=", "text=", "to="]
    found = complete_change(SimpleNamespace(info_name="search"), "search.ra")
    assert ("search.ratio=", "Share of the parameters at the start (K / parameters).") in found
    assert all(name.startswith("search.ra") for name, _ in found)
    assert ("search.ratio", "Share of the parameters at the start (K / parameters).") in complete_key("search.")
    assert complete_kind("s") == ["sequence-classification", "sft"]


def test_the_shell_gets_verbs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"_IRDSCALE_COMPLETE": "complete_bash", "COMP_WORDS": "irdscale e", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        command_line.run([])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == ["evaluate", "export"]
