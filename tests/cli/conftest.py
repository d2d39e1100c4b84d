"""A configuration, stand-ins for the functions that verbs call, and a process that a verb leaves as it was."""

import logging
import os
import sys
import types

import pytest

from irdscale.cli.logs import QUIET


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: m}}\ntask: {{dataset: glue/rte}}\noutput: {tmp_path}/out\n")
    return str(path)


@pytest.fixture
def process_restored(monkeypatch):
    """A verb sets environment defaults and a log handler for its process: undo both."""
    for name in QUIET:
        monkeypatch.setenv(name, os.environ.get(name, "unset"))
    logger = logging.getLogger("irdscale")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before[0], before[1], before[2]


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Stand-ins for what the verbs call: each call is noted; `called.result` is returned or raised.

    The working folder has what the arguments name: adapters `a` and `x`, a mask, and a file of samples.
    """
    folder = tmp_path / "working"
    for file in ("a/adapter.json", "x/adapter.json", "a/b=c/mask.json", "b.csv"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    monkeypatch.chdir(folder)
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
        "irdscale.training.predict": ["run_predict"],
        "irdscale.tasks.preview": ["run_data"],
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
