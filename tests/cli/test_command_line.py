"""The command: usage, help, examples, imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import irdscale
from irdscale.cli import command_line

pytestmark = pytest.mark.usefixtures("process_restored")
ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "evaluate", "ray", "matplotlib", "scipy", "sklearn", "pandas", "peft")
VERBS = [
    "search",
    "compare",
    "fisher",
    "train",
    "evaluate",
    "export",
    "report",
    "doctor",
    "plan",
    "bench",
    "data",
    "predict",
    "init",
    "help",
    "schema",
]
# They call no function that has a stand-in.
ALONE = ("init", "help", "schema")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serch", "x.yaml"], ["found verb 'serch'", 'did you mean "search"?', "evaluate"]),
        (["--json"], ["No such option: --json"]),
        (["search", "x.yaml", "--jsn"], ["No such option: --jsn", "--json"]),
        (["search"], ["CONFIG"]),
        (["search", "no/such.yaml"], ["no/such.yaml: cannot read the configuration: No such file"]),
    ],
)
def test_wrong_usage_is_one_line(capsys, arguments, words):
    assert command_line.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("irdscale: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_no_arguments_show_the_help_and_are_wrong(capsys):
    assert command_line.run([]) == 2
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f" {verb} " in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_that_fits_a_line(capsys, verb):
    assert command_line.run([verb, "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    example = lines[lines.index("Example:") + 1 :]
    (command,) = [line for line in example if line]
    assert command.startswith(f"irdscale {verb}")


def test_the_example_in_the_help_is_understood(called, capsys, tmp_path, monkeypatch):
    called.result = {"ok": True, "failed": [], "refused": {"rows": 0}}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "studies").mkdir(parents=True)
    for name in ("quickstart", "studies/lm_mixed"):
        (tmp_path / "configs" / f"{name}.yaml").write_text("model: {path: m}\ntask: {dataset: glue/rte}\n")
    for file in ("quickstart/adapter/adapter", "a/adapter/adapter", "fisher/mask/mask"):
        (tmp_path / "runs" / file).parent.mkdir(parents=True)
        (tmp_path / "runs" / f"{file}.json").write_text("{}")
    lines = [json.dumps({"text": f"text {n}", "label": n % 2}) for n in range(40)]
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    for command in command_line.app.registered_commands:
        example = command.epilog.split("\n\n")[1].partition(" > ")[0].split()
        assert command_line.run([*example[1:], "--json"]) == 0
    # A search and a comparison write their reports too.
    assert len(called.list) == len(VERBS) - len(ALONE) + 2


def test_version(capsys):
    assert command_line.run(["--version"]) == 0
    assert capsys.readouterr().out == f"irdscale {irdscale.__version__}\n"


def python(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT
    )


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"], ["search", "CONFIG", "search.ratoi=1"]])
def test_quick_answers_import_nothing_heavy(config, arguments):
    code = (
        "import sys; from irdscale.cli import command_line; code = command_line.run(sys.argv[1:])\n"
        f"print(code, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = python(code, *[config if word == "CONFIG" else word for word in arguments])
    expected = 2 if "CONFIG" in arguments else 0
    assert done.stderr.splitlines()[-1] == f"{expected} []"


def test_module_runs_like_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "irdscale", "serch"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert 'did you mean "search"?' in done.stderr
