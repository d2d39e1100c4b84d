"""A configuration's file: what is read, and one clear line for what is wrong, before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from irdscale.config.loader import (
    changes_of,
    config_changes,
    dump_config,
    load_config,
    refuse_repeated,
    same_search,
    settings_of_ranks,
)
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError

MINIMAL = "model:\n  path: ./model\ntask:\n  dataset: glue/rte\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_and_relative_paths(file: Path) -> None:
    config = load_config(file)
    assert config.model.path == str(file.parent / "model")
    assert config.task.dataset == "glue/rte"
    assert config.search.seeds == [0, 1]
    assert config.train.always_train == "auto"


def test_overrides_are_yaml(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(
        file,
        [
            "search.seeds=[3, 4]",
            "task.columns={text: [a, b], label: y}",
            "task.limit.train=5",
            "task.limit.test=6",
            "train.learning_rate=1e-3",
            "task.dataset=./data.csv",
            "train.always_train=['^head']",
        ],
    )
    assert config.search.seeds == [3, 4]
    assert config.task.columns is not None
    assert config.task.columns.text == ["a", "b"]
    assert (config.task.limit.train, config.task.limit.test) == (5, 6)
    assert config.train.learning_rate == 0.001
    assert config.task.dataset == str(elsewhere / "data.csv"), "relative to the working folder, not to the YAML file"
    assert config.train.always_train == ["^head"]


def test_an_override_replaces_a_whole_section(file: Path) -> None:
    file.write_text(MINIMAL + "  limit: {train: 7, test: 8}\n")
    assert load_config(file).task.limit.train == 7
    assert load_config(file, ["task.limit={test: 9}"]).task.limit.train is None
    assert load_config(file, ["task.limit.test=9"]).task.limit.train == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.ratoi=1", 'search.ratoi: unknown key (did you mean "ratio"?)'),
        ("serch.ratio=1", 'serch: unknown key (did you mean "search"?)'),
        (
            "foo.bar=1",
            "foo: unknown key; expected one of model, task, fisher, search, train, distributed, compare, output",
        ),
        (
            "compare.variants={x: [ird, search.rank_bi=loss]}",
            'compare.variants.x: search.rank_bi: unknown key (did you mean "rank_by"?)',
        ),
        ("task.limit={trian: 3}", 'task.limit.trian: unknown key (did you mean "train"?)'),
        ("task.columns={txt: [a], label: y}", 'task.columns.txt: unknown key (did you mean "text"?)'),
        ("search={ratio: x, ratoi: 1}", 'search.ratoi: unknown key (did you mean "ratio"?)'),
        ("search=3", "search: found 3; expected a section with keys such as ratio, count_head, min_ratio"),
        ("train=null", "train: found nothing; expected a section with keys such as steps, epochs, batch_size"),
        ("task.limit=3", "task.limit: found 3; expected a section with keys such as train, selection, test"),
        ("model={}", "model.path: missing; expected a value"),
        ("model.path=''", "model.path: found ''; expected some text"),
        ("model.path.x=3", "model.path: found {'x': 3}; expected a valid string"),
        ("train.always_train=3", "train.always_train: found 3; expected 'auto' or a list of regular expressions"),
        ("train.always_train=a", "train.always_train: found 'a'; expected 'auto' or a list of regular expressions"),
        ("train.always_train=[1]", "train.always_train.0: found 1; expected a valid string"),
        ("task.columns={text: [], label: y}", "task.columns.text: found []; expected at least 1 item"),
        ("task.columns={text: [a, b, c], label: y}", "expected at most 2 items"),
        ("search.seeds=[x]", "search.seeds.0: found 'x'; expected a valid integer"),
        ("search.seeds=0", "search.seeds: found 0; expected a list: write [0]"),
        ("search.seeds=0,1", "search.seeds: found '0,1'; expected a list: write [0,1]"),
        ("search.seeds=zero", "search.seeds: found 'zero'; expected a list, in brackets"),
        ("compare.learning_rates=1e-3", "compare.learning_rates: found 0.001; expected a list: write [0.001]"),
        ("model.path=", "model.path: found nothing; expected a local folder, a hub id, a GGUF file or package:"),
        ("task.delimiter=ab", "task.delimiter: found 'ab'; expected one character, such as ';', or tab"),
        ("search.ratio=0", "search.ratio: found 0; expected greater than 0"),
        ("search.ratio=1.5", "search.ratio: found 1.5; expected less than or equal to 1"),
        ("search.ratio=.nan", "search.ratio: found nan; expected a finite number"),
        ("search.ratio='1'", "search.ratio: found '1'; expected a valid number"),
        ("fisher.samples=1e3", "fisher.samples: found 1000.0; expected a valid integer"),
        ("fisher.samples=true", "fisher.samples: found True; expected a valid integer"),
        ("fisher.head_warmup=-1", "fisher.head_warmup: found -1; expected greater than or equal to 0"),
        ("fisher.objective=labl", "fisher.objective: found 'labl' (did you mean \"label\"?); expected 'label'"),
        ("fisher.score=fihser", "fisher.score: found 'fihser' (did you mean \"fisher\"?); expected 'fisher'"),
        ("task.limit.train=0", "task.limit.train: found 0; expected greater than or equal to 1"),
    ],
)
def test_wrong_values_say_where_and_what(file: Path, override: str, expected: str) -> None:
    text = message(file, override)
    assert text.startswith("command line: ")
    assert expected in text


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("task.columns={text: a, label: y}", ["a"]),
        ("fisher.include=a.*b", ["a.*b"]),
        ("compare.methods=ird", ["ird"]),
        ("compare.variants={x: ird}", {"x": ["ird"]}),
    ],
)
def test_one_text_is_a_list_of_one(file: Path, override: str, read: object) -> None:
    section, key = override.partition("=")[0].split(".")
    found = getattr(getattr(load_config(file, [override]), section), key)
    assert (found.text if key == "columns" else found) == read


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["search.ratio=0.1", "search.ratio=0.1"], "command line: search.ratio: given twice"),
        (
            ["search.ratio=0.1", "search={patience: 3}"],
            "command line: search: found after search.ratio=, which it replaces; expected search= first",
        ),
    ],
)
def test_a_change_that_a_later_one_replaces_is_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(InputError) as caught:
        refuse_repeated(overrides, "command line")
    assert str(caught.value) == line
    with pytest.raises(InputError):
        changes_of(overrides)
    refuse_repeated(["search={patience: 3}", "search.ratio=0.1", "search.ratios=2"], "command line")


def test_a_variant_changes_each_key_once(file: Path) -> None:
    twice = message(file, "compare.variants={x: [ird, search.ratio=0.1, search.ratio=0.2]}")
    assert twice == "command line: compare.variants.x: search.ratio: given twice"


@pytest.mark.parametrize(("given", "read"), [("';'", ";"), ("tab", "\t"), ("'\\t'", "\t"), ('"\\t"', "\t")])
def test_a_delimiter_is_one_character_or_tab(file: Path, given: str, read: str) -> None:
    assert load_config(file, [f"task.delimiter={given}"]).task.delimiter == read


@pytest.mark.parametrize("override", ["search.ratio", "=3", ""])
def test_an_override_is_key_equals_value(file: Path, override: str) -> None:
    assert "expected key=value" in message(file, override)


def test_an_override_that_is_no_yaml(file: Path) -> None:
    assert message(file, "search.seeds=[1").startswith("search.seeds=[1:1: not YAML: ")


def test_errors_in_the_file_name_the_line(file: Path) -> None:
    file.write_text(MINIMAL + "search:\n  ratio: 2\n")
    assert message(file).startswith(f"{file}:6: search.ratio: found 2; expected")
    file.write_text(MINIMAL + "search:\n  # a comment\n  ratoi: 2\n")
    assert message(file) == f'{file}:7: search.ratoi: unknown key (did you mean "ratio"?)'
    file.write_text(MINIMAL + "  max_length: 2\n")
    assert message(file).startswith(f"{file}:5: task.max_length: found 2")
    file.write_text(MINIMAL + "model: {path: x}\n")
    assert message(file) == f"{file}:5: model: given twice"


def test_an_unknown_key_is_shown_before_what_it_causes(file: Path) -> None:
    file.write_text("model:\n  pth: x\ntask:\n  dataset: glue/rte\n")
    assert message(file) == f'{file}:2: model.pth: unknown key (did you mean "path"?)'
    file.write_text("modell: {path: x}\ntask: {dataset: glue/rte}\n")
    assert message(file) == f'{file}:1: modell: unknown key (did you mean "model"?)'


def test_missing_sections(file: Path) -> None:
    file.write_text("model: {path: x}\n")
    assert message(file) == f"{file}: task: missing; expected a section with dataset"
    for content in ("", "- 1\n", "word"):
        file.write_text(content)
        assert "found no sections; expected model, task" in message(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot read the configuration: No such file" in message(tmp_path / "none.yaml")
    assert "cannot read the configuration: Is a directory" in message(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in message(tmp_path / "bytes.yaml")
    (tmp_path / "broken.yaml").write_text("model:\n  path: [x\n")
    assert "broken.yaml:3: not YAML" in message(tmp_path / "broken.yaml")


@pytest.mark.parametrize("value", ["!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "!own {a: 1}"])
def test_yaml_tags_are_refused(file: Path, value: str) -> None:
    file.write_text(MINIMAL + f"output: {value}\n")
    text = message(file)
    assert text.startswith(f"{file}:5: ")
    assert "found the tag" in text or "could not determine a constructor for the tag" in text


def test_a_value_that_contains_itself(file: Path) -> None:
    file.write_text(MINIMAL + "search:\n  seeds: &a [*a]\n")
    assert "a value that contains itself" in message(file)


def test_dump_and_load_give_the_same(file: Path) -> None:
    config = load_config(file, ["search.ratio=0.01", "fisher.exclude=['a$']"])
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config


def test_changes_are_named(file: Path) -> None:
    old = load_config(file).model_dump(mode="json")
    new = load_config(file, ["search.ratio=0.01", "task.limit.train=3"]).model_dump(mode="json")
    assert config_changes(old, new) == ["search.ratio: 0.005 -> 0.01", "task.limit.train: None -> 3"]
    assert config_changes(old, old) == []


def test_no_heavy_imports() -> None:
    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, irdscale.config.loader; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_how_ranks_talk_is_no_part_of_a_search(file: Path) -> None:
    file.write_text(MINIMAL)
    changed = load_config(
        file, ["distributed={backend: gloo, timeout_minutes: 5, silent_seconds: 30}", "search.runner=ray"]
    )
    before, after = (config.model_dump(mode="json") for config in (load_config(file), changed))
    assert before["distributed"] == {"backend": "auto", "timeout_minutes": 360.0, "silent_seconds": 60.0}
    assert same_search(before) == same_search(after)


def test_a_chat_template_is_a_place_or_its_text(file: Path) -> None:
    file.write_text(MINIMAL + "  kind: sft\n  chat_template: ./chat.jinja\n")
    assert load_config(file).task.chat_template == str(file.parent / "chat.jinja")
    written = load_config(file, ["task.chat_template='{{ messages }}'"])
    assert written.task.chat_template == "{{ messages }}"
    # Whether other text came of it, the digests of the samples tell.
    assert same_search(written.model_dump(mode="json")) == same_search(load_config(file).model_dump(mode="json"))


def test_what_ranks_must_agree_on_leaves_out_places(file: Path) -> None:
    file.write_text(MINIMAL)
    facts = settings_of_ranks(
        load_config(file, ["task.kind=regression", "output=x"]), {"zero_optimization": {"stage": 2}}
    )
    assert facts["task.kind"] == '"regression"'
    assert facts["train.deepspeed"] == '{"zero_optimization": {"stage": 2}}'
    assert facts["search.ray.ranks"] == "1"
    assert not {"output", "model.path", "task.dataset"} & set(facts)
