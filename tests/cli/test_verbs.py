"""Each verb calls its function with its arguments, and shows the result."""

import json

import pytest

from irdscale.cli import command_line

pytestmark = pytest.mark.usefixtures("process_restored")
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
    assert (name, kwargs) == ("run_search", {"progress": True, "overwrite": False})
    assert report == ("write_report", (tmp_path / "out",), {})
    assert settings.search.seeds == [3, 4]
    assert settings.train.steps == 7
    out, err = capsys.readouterr()
    assert err == "chatter of a library\n" * 2
    rows = out.splitlines()
    assert "mrpc: f1, mean over 2 seeds" in out
    assert any(
        "winner" in row and "32" in row and "5,678" in row and "0.9123" in row and "0.8900" in row for row in rows
    )
    assert any("random" in row and "0.8400" in row for row in rows)
    assert any("linear probe" in row and "0.6900" in row for row in rows)
    assert "0.568 % of the model: 5,678 of 1,000,000 parameters, and the head." in out
    assert "2 rounds without a new best; 12 evaluations (4 reused) in 2 min 5 s." in out
    assert f"Report:  {tmp_path}/out/report.html" in rows
    assert f"Adapter: {tmp_path}/out/adapter" in rows


def test_json_is_all_there_is_on_stdout(config, called, capsys):
    called.result = RESULT
    assert command_line.run(["search", config, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT


@pytest.mark.parametrize(
    ("arguments", "name", "own"),
    [
        (["fisher", "CONFIG"], "run_fisher", {"progress": True, "overwrite": False}),
        (["train", "CONFIG"], "run_train", {"mask": None, "progress": True, "overwrite": False}),
        (["train", "CONFIG", "mask=a/b=c"], "run_train", {"mask": "a/b=c", "progress": True, "overwrite": False}),
        (["evaluate", "CONFIG", "adapter=a"], "run_evaluate", {"adapter": "a", "progress": True}),
        (
            ["evaluate", "CONFIG", "adapter=a", "to=TMP/x"],
            "run_evaluate",
            {"adapter": "a", "to": "TMP/x", "progress": True},
        ),
        (
            ["predict", "CONFIG", "adapter=a", "input=b.csv", "to=TMP/x"],
            "run_predict",
            {"adapter": "a", "input": "b.csv", "to": "TMP/x", "progress": True},
        ),
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


def test_words_stand_for_the_keys_of_sizes_and_times(config, called, capsys):
    called.result = {"params": 5201, "parameters": 260032, "loss": {"began": 5.89e-5}, "seconds": 95.2}
    assert command_line.run(["fisher", config]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "trained parameters  5,201",
        "model size          260,032",
        "loss.began          0.0000589",
        "time                1 min 35 s",
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
    assert "a comparison; expected the output of a search" in capsys.readouterr().err
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
    first, *others = out.splitlines()
    assert first == f"irdscale search {'can' if ok else 'cannot'} run here."
    versions = others[others.index("Versions") :]
    assert f"  torch {'2.9' if ok else 'missing'} (needs >=2.8)" in versions
    assert "  python 3.11.7" in versions
    assert command_line.run(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == called.result


def test_doctor_says_what_the_cluster_has_and_how_long_a_search_takes(config, called, capsys, tmp_path):
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
    assert command_line.run(["doctor", config, "search.max_rounds=8"]) == 0
    assert called.list[-1][1][0].search.max_rounds == 8
    assert capsys.readouterr().out.splitlines() == [
        "irdscale search can run here.",
        "With search.runner=ray it takes at most about 1 h 2 min: 4 evaluations at once, 0.12 s a step, 0.50 s a "
        "sample gradient.",
        "It runs at most 54 evaluations of 1,000 steps, over 8 rounds.",
        "",
        "Machine",
        "  Ray cluster at 10.0.0.1:6379: 4 nodes, 32 CPUs, 4 GPUs, 128.0 GiB",
        "",
        "Versions",
        "  bitsandbytes missing",
        "  deepspeed missing",
        "  ray 2.60.0",
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
    assert "2 threads, torch 2.13.0" in shown
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


@pytest.mark.parametrize("verb", ["search", "fisher", "train", "export"])
def test_output_is_checked_before_anything_is_loaded(config, called, capsys, tmp_path, verb):
    (tmp_path / "out").write_text("a file")
    extra = ["adapter=a", f"to={tmp_path}/out"] if verb == "export" else []
    assert command_line.run([verb, config, *extra]) == 2
    assert "is a file; expected a folder that can be written" in capsys.readouterr().err
    assert called.list == []


def test_minutes_of_a_comparison_are_a_budget(config, called, capsys):
    called.result = {"seeds": [], "missing": {"done": 5}}
    assert command_line.run(["compare", config, "--minutes", "2.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == called.result
    # Without a complete seed, no report is written.
    ((name, _, kwargs),) = called.list
    assert name == "run_compare"
    assert 120 < kwargs["budget"].left() < 150 - 15 + 0.001
    called.list.clear()
    called.result = {"seeds": [0]}
    assert command_line.run(["compare", config, "--json"]) == 0
    assert [name for name, _, _ in called.list] == ["run_compare", "write_comparison"]
    assert called.list[0][2]["budget"] is None
    called.list.clear()
    assert command_line.run(["compare", config, "--minutes", "0"]) == 2
    assert "--minutes: found 0; expected minutes above 0" in capsys.readouterr().err
    assert called.list == []
