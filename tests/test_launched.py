"""Verbs under torchrun: the same masks as one process, one line for a mistake, no verb that all ranks would repeat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from irdscale.cli import run
from irdscale.config import load_config
from irdscale.errors import InputError
from irdscale.launched import launched
from irdscale.search.run import run_search
from irdscale.verbs import run_fisher
from tests.search.toy import write_config

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [*TORCHRUN, "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["--local-addr", "127.0.0.1", "-m", "irdscale", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("launched"))


def test_fisher_on_two_ranks_writes_the_mask_of_one(config: Path, tmp_path: Path) -> None:
    changes = ["fisher.dtype=float64", "model.dtype=float64"]
    expected = run_fisher(load_config(config, [*changes, f"output={tmp_path / 'one'}"]), progress=False)
    done = torchrun(
        "fisher",
        str(config),
        *changes,
        "fisher.layout=sharded",
        f"output={tmp_path / 'two'}",
        "fisher.save_minutes=0",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert {k: found[k] for k in ("hash", "params", "sample_gradients")} == {
        k: expected[k] for k in ("hash", "params", "sample_gradients")
    }
    traces = [json.loads((tmp_path / name / "traces.json").read_text()) for name in ("one", "two")]
    assert traces[0]["row"] == traces[1]["row"]
    assert traces[1]["trace"] == pytest.approx(traces[0]["trace"], rel=1e-9)
    assert not list((tmp_path / "two" / "fisher").iterdir()), "the state of the pass is gone"


def test_search_on_two_ranks_finds_the_same_winner(config: Path, tmp_path: Path) -> None:
    changes = ["fisher.dtype=float64", "model.dtype=float64", "search.max_rounds=1", "train.steps=6"]
    expected = run_search(load_config(config, [*changes, f"output={tmp_path / 'one'}"]), progress=False)
    done = torchrun("search", str(config), *changes, f"output={tmp_path / 'two'}", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["best"] == expected["best"]
    assert found["pareto"] == expected["pareto"]
    assert found["sample_gradients"] == expected["sample_gradients"]
    assert (tmp_path / "two" / "report.html").exists()


def test_a_mistake_is_one_line_for_all_ranks(config: Path, tmp_path: Path) -> None:
    done = torchrun("fisher", str(config), "fisher.include=[nothing_like_it]", f"output={tmp_path / 'x'}")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("irdscale: ")]
    assert len(ours) == 1
    assert "fisher.include=['nothing_like_it']" in ours[0]
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [["train", "CONFIG"], ["evaluate", "CONFIG", "adapter=x"], ["export", "CONFIG"]])
def test_verbs_for_one_process_refuse_a_launcher(
    arguments: list[str], config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run([str(config) if word == "CONFIG" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"irdscale: {arguments[0]}: found 2 ranks (WORLD_SIZE); expected one process: start it without a launcher\n"
    )


def test_launchers_variables_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert launched() == (0, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE: found 'two' in the environment; expected a number"):
        launched()
