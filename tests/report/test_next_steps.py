"""Pages say what to do next, explain their terms, fit the screen, and hold commands that run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from irdscale.cli import command_line
from irdscale.config.loader import load_config
from irdscale.report import write_report
from irdscale.report.next_steps import next_steps, seed_interval
from irdscale.search.run import run_search
from tests.cli.conftest import process_restored  # noqa: F401
from tests.pages import Cells, least_widths
from tests.report.fake import write_output
from tests.search.toy import write_config


def verb_of(line: str, output: Path) -> str:
    words = shlex.split(line)
    return words[words.index(str(output / "config.yaml")) - 1]


def changed(folder: Path, **changes: Any) -> dict[str, Any]:
    """A result whose winner has dropped samples; `changes` are keys of the winner."""
    write_output(folder, **changes)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    result["path"][0]["samples"] = 64
    return result


@pytest.mark.parametrize(
    ("changes", "said", "verbs"),
    [
        ({"fish": 0.71}, "The winner beats random samples, which 2 seeds cannot prove: compare", ["compare"]),
        ({"fish": 0.71, "seeds": (0, 1, 2, 3, 4)}, "beats random samples beyond the chance of the seeds", []),
        ({"fish": 0.80}, "Random samples gave the better mask, which 2 seeds cannot prove", ["train", "compare"]),
        ({"probe": 0.80}, "The winner does not beat the head alone for every seed: first find a training", ["search"]),
        ({"same_mask": True}, "Both masks are equal: train one FISH mask", ["train", "compare"]),
    ],
)
def test_the_result_says_what_to_do(tmp_path: Path, changes: dict[str, Any], said: str, verbs: list[str]) -> None:
    text, commands = next_steps(changed(tmp_path, **changes), tmp_path)
    assert said in text
    assert [verb_of(line, tmp_path) for line in commands] == verbs
    assert "The section Use it" in text


def test_seeds_that_disagree_ask_for_more(tmp_path: Path) -> None:
    result = changed(tmp_path, seeds=(0, 1, 2))
    for one, test in zip(result["baseline"]["fish_random"]["seeds"], (0.75, 0.70, 0.73), strict=True):
        one["test_metric"] = test
    text, commands = next_steps(result, tmp_path)
    assert "The seeds do not tell the winner from random samples (gain +0.0033, 95 % interval -0.0" in text
    assert "compare.seeds=[0,1,2,3,4]" in shlex.split(commands[0])


def test_the_edges_of_a_search_are_named(tmp_path: Path) -> None:
    result = changed(tmp_path)
    result["config"] |= {"search": {"seeds": [0, 1], "max_rounds": 1, "ratio": 0.01}}
    text, commands = next_steps(result, tmp_path)
    assert "The last of 1 rounds was the best" in text
    assert "search.max_rounds=4" in shlex.split(commands[-1])
    result["path"][0] |= {"params": 20}
    text, commands = next_steps(result, tmp_path)
    assert "The largest number of parameters was the best: search.ratio=0.02 may be better still." in text
    assert "search.ratio=0.02" in shlex.split(commands[-1])


def test_interval_of_seeds() -> None:
    assert seed_interval([0.1, 0.2]) is None
    mean, low, high = seed_interval([0.01, 0.02, 0.03]) or (0, 0, 0)
    assert (mean, low, high) == pytest.approx((0.02, 0.02 - 0.024841, 0.02 + 0.024841), abs=1e-6)


TERMS = (
    "mask",
    "Fisher information",
    "Fisher trace",
    "IRD",
    "pool",
    "round",
    "candidate",
    "seed",
    "selection split",
    "test split",
    "FISH",
    "head",
    "linear probe",
    "accuracy",
    "Spearman",
    "adapter",
)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("irdscale.report.write.draw_all", lambda facts: {})


@pytest.mark.usefixtures("no_figures")
def test_terms_are_explained_where_they_are_first_used(tmp_path: Path) -> None:
    write_report(write_output(tmp_path, name="a task"))
    page = Cells((tmp_path / "report.html").read_text())
    # The line below the title names the verb and the seeds.
    begin = page.text.index("A mask is")
    for term in TERMS:
        places = [place for found, place in page.terms if found.lower() == term.lower()]
        assert places, term
        first = re.search(rf"\b{re.escape(term)}", page.text[begin:], 0 if term.isupper() else re.IGNORECASE)
        assert first is not None
        assert begin + first.start() == places[0], term


@pytest.mark.usefixtures("no_figures")
def test_tables_fit(tmp_path: Path) -> None:
    write_output(tmp_path, seeds=tuple(range(8)), fish=0.123)
    result = json.loads((tmp_path / "result.json").read_text())
    for entry in (result["best"], *result["baseline"].values()):
        entry["test_error"] = 0.0236
    (tmp_path / "result.json").write_text(json.dumps(result))
    write_report(tmp_path)
    page = Cells((tmp_path / "report.html").read_text())
    assert len(page.tables) > 5
    assert max(least_widths(page)) < 1160


@pytest.mark.usefixtures("no_figures")
def test_many_seeds_have_no_columns(tmp_path: Path) -> None:
    write_report(write_output(tmp_path, seeds=tuple(range(20))))
    page = Cells((tmp_path / "report.html").read_text())
    assert ["winner", "32", "20", "0.7500", "0.7300"] in page.rows
    assert max(least_widths(page)) < 1160


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short search in a folder whose name a shell would split."""
    folder = tmp_path_factory.mktemp("use it")
    config = load_config(write_config(folder), ["search.max_rounds=1", "search.seeds=[0]", "train.steps=4"])
    run_search(config, progress=False)
    write_report(Path(config.output))
    return Path(config.output)


def blocks(output: Path, kind: str) -> list[str]:
    return [text for found, text in Cells((output / "report.html").read_text()).blocks if found == kind]


@pytest.mark.usefixtures("process_restored")
def test_commands_of_use_it_run_as_they_stand(searched: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in blocks(searched, "shell"):
        words = shlex.split(line)
        ran.append(verb_of(line, searched))
        assert command_line.run(words[words.index(ran[-1]) :]) == 0
    assert ran == ["evaluate", "predict", "predict", "export"]
    assert len((searched / "predictions.jsonl").read_text().splitlines()) == 32
    assert (searched / "merged" / "model.safetensors").exists()


def test_python_of_use_it_runs_as_it_stands(searched: Path) -> None:
    (code,) = blocks(searched, "python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].num_labels == 2


def test_commands_of_the_next_step_are_valid(searched: Path) -> None:
    result = json.loads((searched / "result.json").read_text())
    _, commands = next_steps(result, searched)
    assert commands
    for line in commands:
        words = shlex.split(line)
        place = words.index(str(searched / "config.yaml"))
        config = load_config(words[place], words[place + 1 :])
        assert Path(config.output) != searched
