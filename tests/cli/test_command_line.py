import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import irdscale
from irdscale import InputError, RunError
from irdscale.cli import command_line
from tests.search.toy import write_config

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "evaluate", "ray", "matplotlib", "scipy", "sklearn", "pandas", "peft")
RESULT = {
    "best": {
        "samples": 32,
        "params": 5678,
        "metric": 0.91234,
        "test_metric": 0.89,
        "test_error": None,
        "mask": "masks/abc",
        "adapter": "adapter",
        "seeds": [{"seed": 0, "metric": 0.91, "test_metric": 0.88}, {"seed": 1, "metric": 0.914, "test_metric": 0.9}],
    },
    "pareto": [],
    "path": [],
    "stop": "2 rounds without a new best",
    "baseline": {
        "fish_random": {"samples": 32, "params": 5678, "metric": 0.85, "test_metric": 0.84, "test_error": None},
        "linear_probe": {"params": 0, "metric": 0.7, "test_metric": 0.69, "test_error": None},
    },
    "evaluations": 12,
    "reused": 4,
    "warnings": [],
    "seconds": {"total": 125.0},
    "task": {"name": "mrpc", "metric": "f1"},
    "model": {"parameters": 1000000, "head": 770},
}
VERBS = ["search", "compare", "fisher", "train", "evaluate", "export", "report", "doctor", "plan", "bench"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: m}}\ntask: {{dataset: glue/rte}}\noutput: {tmp_path}/out\n")
    return str(path)


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch):
    """A verb sets environment defaults and a log handler for its process: undo both."""
    for name in command_line.QUIET:
        monkeypatch.setenv(name, os.environ.get(name, "unset"))
    logger = logging.getLogger("irdscale")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before[0], before[1], before[2]


@pytest.fixture
def called(monkeypatch):
    """Stand-ins for what the verbs call: each call is noted; `called.result` is returned or raised."""
    calls = types.SimpleNamespace(list=[], result={"steps": 1200, "metric": 0.98765432, "mask": "masks/abc"})

    def function(name):
        def stand_in(*args, **kwargs):
            calls.list.append((name, args, kwargs))
            print("chatter of a library")
            if isinstance(calls.result, BaseException):
                raise calls.result
            return calls.result

        return stand_in

    for module, names in {
        "irdscale.search.run": ["run_search"],
        "irdscale.compare.run": ["run_compare"],
        "irdscale.training.one_mask": ["run_fisher", "run_train", "run_evaluate", "run_export"],
        "irdscale.cli.doctor": ["diagnose"],
        "irdscale.bench": ["run_bench"],
    }.items():
        fake = types.ModuleType(module)
        for name in names:
            setattr(fake, name, function(name))
        monkeypatch.setitem(sys.modules, module, fake)
    # Packages whose other modules the verbs read.
    monkeypatch.setattr("irdscale.plan.run_plan", function("run_plan"))
    monkeypatch.setattr("irdscale.compare.write_comparison", function("write_comparison"))
    monkeypatch.setattr("irdscale.report.write_report", function("write_report"))
    return calls


@pytest.mark.parametrize(
    ("arguments", "world"),
    [(["search", "search.runner=ray", "search.ray.fisher_ranks=3"], "1"), (["fisher"], "3")],
)
def test_ranks_that_cannot_warm_a_head_up_are_refused_before_any_work(
    config, called, capsys, monkeypatch, arguments, world
):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": world}.items():
        monkeypatch.setenv(name, value)
    verb, *overrides = arguments
    assert command_line.run([verb, config, *overrides, "train.batch_size=8", "fisher.head_warmup=2"]) == 2
    assert "train.batch_size: found 8; expected a multiple of 3: 3 rank(s)" in capsys.readouterr().err
    assert called.list == []


def test_search_shows_winner_baselines_and_report(config, called, capsys, tmp_path):
    called.result = RESULT
    assert command_line.run(["search", config, "search.seeds=[3,4]", "train.steps=7"]) == 0
    (name, (settings,), kwargs), report = called.list
    assert (name, kwargs) == ("run_search", {"progress": True})
    assert report == ("write_report", (tmp_path / "out",), {})
    assert settings.search.seeds == [3, 4]
    assert settings.train.steps == 7
    out, err = capsys.readouterr()
    assert err == "chatter of a library\n" * 2
    rows = [line.replace("│", "|") for line in out.splitlines()]
    assert "mrpc: f1, mean over 2 seed(s)" in out
    assert any(
        "winner" in row and "32" in row and "5,678" in row and "0.9123" in row and "0.8900" in row for row in rows
    )
    assert any("random" in row and "0.8400" in row for row in rows)
    assert any("linear probe" in row and "0.6900" in row for row in rows)
    assert "0.568 % of the model's 1,000,000" in out
    assert "2 rounds without a new best; 12 evaluations (4 reused) in 2:05." in out
    assert f"Report:  {tmp_path}/out/report.html" in rows
    assert f"Adapter: {tmp_path}/out/adapter" in rows


def test_json_is_all_there_is_on_stdout(config, called, capsys):
    called.result = RESULT
    assert command_line.run(["search", config, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT


@pytest.mark.parametrize(
    ("arguments", "name", "own"),
    [
        (["fisher", "CONFIG"], "run_fisher", {"progress": True}),
        (["train", "CONFIG"], "run_train", {"mask": None, "progress": True}),
        (["train", "CONFIG", "mask=a/b=c"], "run_train", {"mask": "a/b=c", "progress": True}),
        (["evaluate", "CONFIG", "adapter=a"], "run_evaluate", {"adapter": "a", "progress": True}),
        (["export", "CONFIG", "to=TMP/x", "adapter=a"], "run_export", {"adapter": "a", "to": "TMP/x"}),
        (
            ["export", "CONFIG", "adapter=a", "to=TMP/x", "format=shira"],
            "run_export",
            {"adapter": "a", "to": "TMP/x", "format": "shira"},
        ),
        (["export", "CONFIG", "adapter=a", "to=hub:me/x"], "run_export", {"adapter": "a", "to": "hub:me/x"}),
    ],
)
def test_verb_calls_its_function(config, called, capsys, tmp_path, arguments, name, own):
    fill = {"CONFIG": config}
    arguments = [fill.get(word, word.replace("TMP", str(tmp_path))) for word in arguments]
    own = {key: value.replace("TMP", str(tmp_path)) if isinstance(value, str) else value for key, value in own.items()}
    assert command_line.run([*arguments, "train.batch_size=3"]) == 0
    ((found, (settings,), kwargs),) = called.list
    assert (found, kwargs) == (name, own)
    assert settings.train.batch_size == 3
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()] == [
        ["steps", "1,200"],
        ["metric", "0.9877"],
        ["mask", "masks/abc"],
    ]


def test_nested_results_are_listed_by_their_keys(config, called, capsys):
    called.result = {"a": {"b": 1.5, "c": None}, "seeds": [{"seed": 0}, {"seed": 1}], "names": ["x", "y"], "ok": True}
    assert command_line.run(["fisher", config]) == 0
    rows = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["a.b", "1.5"],
        ["a.c", "-"],
        ["seeds.0.seed", "0"],
        ["seeds.1.seed", "1"],
        ["names", "x, y"],
        ["ok", "yes"],
    ]


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["evaluate"], "adapter"),
        (["export", "adapter=a"], "to"),
        (["export", "to=b"], "adapter"),
        (["export"], "adapter"),
    ],
)
def test_missing_folders_are_named(config, called, capsys, arguments, missing):
    verb, *rest = arguments
    assert command_line.run([verb, config, *rest]) == 2
    assert capsys.readouterr() == ("", f"irdscale: {missing}: missing; expected {missing}=DIR among the arguments\n")
    assert called.list == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("mask=", "mask: found no folder; expected mask=DIR"),
        ("mask", "mask: found no folder; expected mask=DIR"),
        ("mask=a mask=b", "mask: given twice"),
    ],
)
def test_wrong_folders_are_refused(config, called, capsys, argument, message):
    assert command_line.run(["train", config, *argument.split()]) == 2
    assert capsys.readouterr().err == f"irdscale: {message}\n"


def test_a_format_is_no_folder(config, called, capsys, tmp_path):
    assert command_line.run(["export", config, "adapter=a", f"to={tmp_path}/x", "format="]) == 2
    assert capsys.readouterr().err == "irdscale: format: found no value; expected format=merged or format=shira\n"
    assert called.list == []


def test_export_help_names_its_ways(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert command_line.run(["export", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("adapter=DIR to=DIR", "format=shira", "to=hub:OWNER/NAME"))


def test_a_folder_that_another_verb_takes_is_an_unknown_key(config, called, capsys):
    assert command_line.run(["search", config, "mask=x"]) == 2
    assert "command line: mask: unknown key" in capsys.readouterr().err
    assert called.list == []


def test_report_takes_a_configuration_or_a_folder(config, called, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "other").mkdir()
    assert command_line.run(["report", config]) == 0
    assert command_line.run(["report", config, f"output={tmp_path}/other"]) == 0
    assert command_line.run(["report", str(tmp_path / "other"), "--samples"]) == 0
    assert [(args, kwargs["samples"]) for _, args, kwargs in called.list] == [
        ((tmp_path / "out",), False),
        ((tmp_path / "other",), False),
        ((tmp_path / "other",), True),
    ]


def test_report_refuses_what_is_not_there_and_changes_to_a_folder(config, called, tmp_path, capsys):
    assert command_line.run(["report", config]) == 2
    assert (
        capsys.readouterr().err
        == f"irdscale: {tmp_path}/out: no such folder; expected the output of irdscale search or compare\n"
    )
    assert command_line.run(["report", str(tmp_path), "output=x"]) == 2
    assert "expected the folder alone" in capsys.readouterr().err
    (tmp_path / "compare.json").touch()
    assert command_line.run(["report", str(tmp_path), "--samples"]) == 2
    assert "found a comparison; expected the output of a search" in capsys.readouterr().err
    assert called.list == []


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_doctor_says_whether_search_can_run(called, capsys, ok, code):
    problem = {"cannot": "run irdscale search", "why": "torch is missing", "blocks_search": True}
    called.result = {
        "python": "3.11.7",
        "torch": None,
        "packages": {"torch": {"found": "2.9" if ok else None, "needs": ">=2.8", "ok": ok}},
        "ray": {"version": None, "cluster": None},
        "search": None,
        "problems": [] if ok else [problem],
        "ok": ok,
    }
    assert command_line.run(["doctor"]) == code
    assert called.list[-1][1] == (None,)
    out = capsys.readouterr().out
    assert ("Cannot run irdscale search: torch is missing" in out) is not ok
    assert f"{'2.9' if ok else 'missing'} (needs >=2.8)" in out
    assert out.splitlines()[-1] == f"irdscale search {'can' if ok else 'cannot'} run here."
    assert command_line.run(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == called.result


def test_doctor_says_what_the_cluster_has_and_how_long_a_search_takes(called, capsys, tmp_path):
    costs = {"step": 0.1234, "gradient": 0.5}
    cluster = {"address": "10.0.0.1:6379", "nodes": 4, "cpus": 32, "gpus": 4, "memory_gib": 128.0}
    called.result = {
        "packages": {},
        "problems": [],
        "ok": True,
        "ray": {"version": "2.60.0", "cluster": None},
        "search": None,
    }
    assert command_line.run(["doctor"]) == 0
    assert "No Ray cluster runs here" in capsys.readouterr().out
    called.result["ray"]["cluster"] = cluster
    called.result["search"] = {
        "at_most": {"rounds": 8, "evaluations": 54, "steps": 1000},
        "local": None,
        "ray": {"at_once": 4, "seconds": 3723.0, "costs": costs},
    }
    config = write_config(tmp_path)
    assert command_line.run(["doctor", str(config), "search.max_rounds=8"]) == 0
    assert called.list[-1][1][0].search.max_rounds == 8
    out = capsys.readouterr().out.splitlines()
    assert out[-4:] == [
        "Ray cluster at 10.0.0.1:6379: 4 node(s), 32 CPUs, 4 GPUs, 128.0 GiB",
        "The search runs at most 54 evaluations of 1,000 steps, over 8 rounds.",
        "search.runner=ray: at most about 1:02:03, 4 evaluations at once; 0.123 s a step, 0.5 s a sample gradient.",
        "irdscale search can run here.",
    ]
    assert command_line.run(["doctor", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot read the configuration" in capsys.readouterr().err


def test_bench_takes_a_part(called, capsys):
    row = {"part": "fisher", "what": "pass / loop", "model": "bert", "tokens": 128, "ratio": 1.234, "low": 1.1}
    row |= {"high": 1.3, "bar": "<= 1.4", "met": True}
    called.result = {
        "threads": 2,
        "torch": "2.13.0",
        "device": None,
        "failed": [],
        "rows": [row, row | {"bar": "", "met": None}],
    }
    assert command_line.run(["bench"]) == 0
    shown = capsys.readouterr().out
    assert "2 thread(s), torch 2.13.0" in shown
    assert [word for word in ("pass / loop", "1.23", "1.10-1.30", "<= 1.4") if word not in shown] == []
    assert command_line.run(["bench", "fisher", "--json"]) == 0
    assert [(args, kwargs) for _, args, kwargs in called.list] == [
        (("all",), {"progress": True}),
        (("fisher",), {"progress": True}),
    ]
    capsys.readouterr()
    assert command_line.run(["bench", "fishr"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    for words in (
        "irdscale: part: found 'fishr'",
        'did you mean "fisher"?',
        "expected fisher, train, search, gpu, all",
    ):
        assert words in err
    assert len(called.list) == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("task.dataset: found\n  nothing"), 2, "task.dataset: found nothing"),
        (RunError("NaN in the loss at row 3"), 1, "NaN in the loss at row 3"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 1, "/a/b: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), 1, "Read-only file system"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from there"),
    ],
)
def test_a_bad_end_is_one_line(config, called, capsys, error, code, line):
    called.result = error
    assert command_line.run(["search", config]) == code
    assert capsys.readouterr() == ("", f"chatter of a library\nirdscale: {line}\n")


@pytest.mark.parametrize(
    ("verb", "arguments", "promise"),
    [
        ("fisher", [], "; the same command goes on from there"),
        ("train", [], "; the same command goes on from the state saved last"),
        ("evaluate", ["adapter=x"], ""),
    ],
)
def test_only_what_saves_its_state_promises_to_go_on(config, called, capsys, verb, arguments, promise):
    called.result = KeyboardInterrupt()
    assert command_line.run([verb, config, *arguments]) == 130
    assert capsys.readouterr().err.endswith(f"irdscale: interrupted{promise}\n")


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EBADF, "a bug")])
def test_a_bug_is_not_hidden(config, called, error):
    called.result = error
    with pytest.raises(type(error), match="a bug"):
        command_line.run(["search", config])


def test_stdout_is_given_back_after_a_verb(config, called, capsys):
    called.result = RunError("x")
    before = sys.stdout
    command_line.run(["search", config])
    assert sys.stdout is before


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
    called.result = {"ok": True, "failed": []}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "studies").mkdir(parents=True)
    for name in ("quickstart", "studies/lm_mixed"):
        (tmp_path / "configs" / f"{name}.yaml").write_text("model: {path: m}\ntask: {dataset: glue/rte}\n")
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    for command in command_line.app.registered_commands:
        example = command.epilog.split("\n\n")[1].split()
        assert command_line.run([*example[1:], "--json"]) == 0
    # A search and a comparison write their reports too.
    assert len(called.list) == len(VERBS) + 2


def test_version(capsys):
    assert command_line.run(["--version"]) == 0
    assert capsys.readouterr().out == f"irdscale {irdscale.__version__}\n"


def test_log_lines_go_to_stderr(config, called, capsys):
    assert command_line.run(["fisher", config]) == 0
    capsys.readouterr()
    logging.getLogger("irdscale.fisher").warning("no rule for [Odd]")
    logging.getLogger("irdscale.fisher").debug("detail")
    assert capsys.readouterr() == ("", "irdscale: no rule for [Odd]\n")


def test_quiet_libraries_by_default_only(config, called, monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
    monkeypatch.setenv("DATASETS_VERBOSITY", "debug")
    command_line.run(["fisher", config])
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert os.environ["DATASETS_VERBOSITY"] == "debug"


def test_check_writable_leaves_nothing_behind(tmp_path):
    command_line.check_writable(tmp_path / "a" / "b", "output")
    assert list(tmp_path.iterdir()) == []


def test_check_writable_names_a_file_in_the_way(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match=r"^output: found .*/a/b, but .*/a is a file; expected a folder"):
        command_line.check_writable(tmp_path / "a" / "b", "output")


@pytest.mark.parametrize(("code", "reason"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")])
def test_check_writable_full_or_read_only(tmp_path, monkeypatch, code, reason):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(command_line.os, "fsync", refuse)
    with pytest.raises(
        InputError, match=rf"^to: cannot write to .*: {reason}.*; expected a folder that can be written"
    ):
        command_line.check_writable(tmp_path / "x", "to")


@pytest.mark.parametrize("verb", ["search", "fisher", "train", "export"])
def test_output_is_checked_before_anything_is_loaded(config, called, capsys, tmp_path, verb):
    (tmp_path / "out").write_text("a file")
    extra = ["adapter=a", f"to={tmp_path}/out"] if verb == "export" else []
    assert command_line.run([verb, config, *extra]) == 2
    assert "is a file; expected a folder that can be written" in capsys.readouterr().err
    assert called.list == []


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


def test_import_is_light_and_the_public_names_are_known():
    code = (
        "import sys, irdscale\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules]\n"
        "assert set(irdscale.__all__) <= set(dir(irdscale))\n"
        "assert all(name in irdscale._HOME or name in vars(irdscale) for name in irdscale.__all__)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in irdscale.__all__ if name in irdscale._HOME])
def test_public_names_come_from_their_modules(name):
    assert getattr(irdscale, name).__module__.startswith(irdscale._HOME[name])


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="accumulate_fishr"):
        _ = irdscale.accumulate_fishr


def test_control_c_in_a_real_process(config):
    code = (
        "import sys, time, types\n"
        "fake = types.ModuleType('irdscale.search.run')\n"
        "def run_search(config, progress):\n"
        "    print('running', flush=True)\n"
        "    time.sleep(60)\n"
        "fake.run_search = run_search\n"
        "sys.modules['irdscale.search.run'] = fake\n"
        "sys.argv[0] = 'irdscale'\n"
        "from irdscale.cli.command_line import main\n"
        "main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "search", config],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # Where the tests run in the background, SIGINT is ignored, and processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr.readline() == "running\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "irdscale: interrupted; the same command goes on from there\n")


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
