"""What the README says works when it is typed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from irdscale import cli
from irdscale.config_file import load_config
from tests.search.toy import write_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line.split(" # ")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_every_command_on_a_toy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's commands in their order, with a toy in the place of the quickstart."""
    write_config(tmp_path)
    toy = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    (tmp_path / "configs").mkdir()
    toy["output"] = "runs/quickstart"
    (tmp_path / "configs/quickstart.yaml").write_text(yaml.safe_dump(toy))
    for name in ("model", "data"):
        (tmp_path / "configs" / name).symlink_to(tmp_path / name)
    (tmp_path / "configs" / "llm").symlink_to(ROOT / "configs" / "llm")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "irdscale.bench.run_bench",
        lambda part, progress: {"threads": 1, "torch": "", "device": None, "failed": [], "rows": []},
    )
    ran = []
    for command in commands():
        if command[0] == "irdscale":
            # The toy machine may lack what doctor asks for; it must only answer.
            expected = (0, 1) if command[1] == "doctor" else (0,)
            assert cli.run(command[1:]) in expected, (command, capsys.readouterr().err)
            ran.append(command[1])
        elif command[0] == "torchrun":
            start = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1", *command[1:]]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, (command, done.stderr)
            assert (tmp_path / "runs/ranks/mask").is_dir()
    verbs = {"search", "report", "fisher", "train", "evaluate", "export", "doctor", "plan", "bench", "compare"}
    assert set(ran) == verbs
    assert (tmp_path / "runs/quickstart/report.html").stat().st_size > 10_000
    assert (tmp_path / "runs/merged/model.safetensors").exists()


@pytest.mark.parametrize("line", re.findall(r"^ {4}irdscale ((?:compare|search) .*)$", README, flags=re.MULTILINE))
def test_commands_of_studies_load(line: str) -> None:
    """Those that take long; tests/test_configs.py runs the studies, cut down."""
    _, config, *overrides = shlex.split(line, comments=True)
    load_config(ROOT / config, overrides)


def test_scripts_exist() -> None:
    scripts = [command[1] for command in commands() if command[0] == "bash"]
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)


def test_the_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (code,) = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["mask"].k == 2000
    assert sum(p.numel() for p in names["model"].parameters() if p.requires_grad) == 2000 + 2 * 64
    assert names["plain"].score.weight.requires_grad
    assert not any("values" in name for name, _ in names["plain"].named_parameters())


@pytest.mark.parametrize("link", sorted(set(re.findall(r"`((?:configs|launch|irdscale|tests)/[\w./-]+)`", README))))
def test_named_files_exist(link: str) -> None:
    assert (ROOT / link).exists()
