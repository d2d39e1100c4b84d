import re
from pathlib import Path

import pytest

from irdscale.cli import app
from irdscale.config import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
VERBS = {command.name or command.callback.__name__ for command in app.registered_commands}


def test_the_quickstart_is_there():
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_what_needs_and_launch(path):
    header = re.match(r"(#[^\n]*\n)+", path.read_text())
    assert header is not None
    for word in ("What", "Needs", "Launch"):
        assert re.search(rf"^# {word}: +\S", header[0], re.MULTILINE), f"no {word} line"
    launch = re.search(r"^# Launch: +irdscale (\S+) (\S+)", header[0], re.MULTILINE)
    assert launch is not None
    assert launch[1] in VERBS
    assert launch[2] == f"configs/{path.name}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_with_its_own_output_folder_and_shipped_data(path):
    config = load_config(path)
    assert config.output == f"runs/{path.stem}"
    if config.task.dataset.startswith("/"):
        assert Path(config.task.dataset).is_relative_to(ROOT / "configs")
        assert Path(config.task.dataset).exists()


def test_the_quickstart_has_rounds_and_seeds_and_needs_no_hub():
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    assert config.search.max_rounds >= 3
    assert len(config.search.seeds) >= 2
    assert config.model.path.startswith("package:")
    assert Path(config.task.dataset).is_absolute()
