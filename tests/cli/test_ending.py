"""How a verb ends: one line and an exit code; what it logs."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from irdscale.cli import command_line
from irdscale.errors import InputError, RunError
from tests.cli.test_command_line import ROOT

pytestmark = pytest.mark.usefixtures("process_restored")


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


def test_control_c_in_a_real_process(config):
    code = (
        "import sys, time, types\n"
        "fake = types.ModuleType('irdscale.search.run')\n"
        "def run_search(config, progress, overwrite):\n"
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
