"""What README.md and the README.md files of the folders say works when it is typed.

Commands in blocks marked bash, and in the tables of README.md, are run in their order with a toy in the place of the
quickstart. Those in blocks marked sh take long or need a cluster: their files and settings are checked. Blocks marked
python are run.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from irdscale.cli import command_line
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from tests.config_keys import PAGE, key_tables, page_with
from tests.search.toy import write_config
from tests.spawned import start_command_on_ranks

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FOLDERS = [
    *(f"irdscale/{name}" for name in ["search", "fisher", "sparse", "training", "tasks", "plan", "bench"]),
    "configs",
    "configs/studies",
]
PAGES = [README, *(ROOT / folder / "README.md" for folder in [*FOLDERS, "launch"])]
SECTIONS = tuple(RunConfig.model_fields)
# How a command begins that stands in a line of text or in a table.
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:irdscale|bash|torchrun|sbatch|ray|kubectl|pip|python) [^`]+")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.parent.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def text_of(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def lines(page: Path, *languages: str) -> list[str]:
    return [line for language in languages for block in blocks(page, language) for line in block.splitlines() if line]


def quoted(page: Path) -> list[str]:
    """What stands between backquotes outside of blocks."""
    return re.findall(r"`([^`\n]+)`", text_of(page))


def in_tables(page: Path) -> list[str]:
    rows = [line for line in text_of(page).splitlines() if line.startswith("|")]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row) if COMMAND.fullmatch(word)]


def in_words(line: str) -> list[str]:
    """A command's words, without what it sets in the environment."""
    words = shlex.split(line)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def overrides_of(words: list[str]) -> list[str]:
    return [word for word in words if re.match(rf"(?:{'|'.join(SECTIONS)})(?:\.[a-z_.]+)?=", word)]


def write_own_data(folder: Path) -> None:
    """The files of "Your own data", as README.md describes their lines, with shorter searches."""
    (line,) = [found for found in quoted(README) if found.startswith('{"text"')]
    (pair,) = [found for found in quoted(README) if found.startswith('{"question"')]
    review, answer = json.loads(line), json.loads(pair)
    reviews = [{**review, "text": f"{review['text']} {n}", "label": ("good", "bad")[n % 2]} for n in range(100)]
    answers = [{**answer, "question": f"{n}. {answer['question']}"} for n in range(100)]
    for name, rows in {"reviews": reviews, "answers": answers}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, block in zip(("reviews", "answers"), blocks(README, "yaml"), strict=True):
        (folder / f"{name}.yaml").write_text(block.replace("epochs: 3", "epochs: 1").replace("rounds: 2", "rounds: 1"))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the toy as its quickstart, and with what is shipped."""
    write_config(tmp_path, train__steps=6, search__max_rounds=1)
    config = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    (tmp_path / "configs").mkdir()
    config["output"] = "runs/quickstart"
    (tmp_path / "configs/quickstart.yaml").write_text(yaml.safe_dump(config))
    for name in ("model", "data"):
        (tmp_path / "configs" / name).symlink_to(tmp_path / name)
    for name in ("llm", "models", "deepspeed"):
        (tmp_path / "configs" / name).symlink_to(ROOT / "configs" / name)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    write_own_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "irdscale.bench.run_bench",
        lambda part, progress: {"threads": 1, "torch": "", "device": None, "failed": [], "rows": []},
    )
    return tmp_path


def run_command(words: list[str]) -> None:
    if words[0] == "irdscale":
        # The toy machine may lack what doctor asks for; it must only answer.
        assert command_line.run(words[1:]) in ((0, 1) if words[1] == "doctor" else (0,)), words
    elif words[0] == "torchrun":
        # tests/distributed has torchrun itself start ranks.
        assert words[1:5:2] == ["--nproc-per-node", "-m"], words
        assert words[4] == "irdscale", words
        ended = [rank.ended() for rank in start_command_on_ranks(words[5:], int(words[2]))]
        assert {code for code, _, _ in ended} == {0}, (words, ended)


def test_every_command_of_the_readme_on_a_toy(toy: Path) -> None:
    ran = set()
    ray = "search.runner=ray"
    for line in [*lines(README, "bash"), *in_tables(README)]:
        words = in_words(line)
        if "my.yaml" not in words and ray not in words:
            run_command(words)
            ran.add(words[1] if words[0] == "irdscale" else words[0])
    verbs = {"search", "report", "fisher", "train", "evaluate", "export", "doctor", "plan", "bench", "compare"}
    assert ran >= {*verbs, "predict", "data", "init", "help", "torchrun"}
    assert (toy / "runs/quickstart/report.html").stat().st_size > 10_000
    for folder in ("runs/merged", "runs/answers-merged"):
        assert (toy / folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if blocks(page, "bash")], ids=lambda page: str(page.parent.relative_to(ROOT))
)
def test_every_command_of_a_folder_on_a_toy(page: Path, toy: Path) -> None:
    for line in lines(page, "bash"):
        run_command(in_words(line))


@each_page
def test_files_and_settings_of_commands(page: Path) -> None:
    """Those that take long or need a cluster too; tests/test_configs.py runs the studies, cut down."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    quoted_ones = [found for found in quoted(page) if COMMAND.fullmatch(found)]
    for line in [*lines(page, "bash", "sh"), *quoted_ones]:
        words = in_words(line)
        for word in words:
            for path in re.findall(r"(?:^|=|\./)((?:configs|launch|tests|irdscale)/[\w./-]+)", word):
                assert (ROOT / path).exists(), (line, path)
        config = next((word for word in words if word.startswith("configs/") and word.endswith(".yaml")), None)
        overrides = [word.replace("=./", f"={ROOT}/").replace("=configs/", f"={ROOT}/configs/") for word in words]
        load_config(ROOT / (config or "configs/quickstart.yaml"), overrides_of(overrides))
        named = re.search(r"pip install .*'\.\[([\w,]+)\]'", line)
        assert named is None or set(named[1].split(",")) <= set(extras), line
        assert "irdscale[" not in line, f"{line}: no index has it; expected '.[EXTRA]'"


@each_page
def test_commands_work_in_zsh(page: Path) -> None:
    """A bracket outside of quotes is a pattern there, and a # begins no comment."""
    settings = [found for found in quoted(page) if overrides_of([found.strip("'")])]
    for line in [*lines(page, "bash", "sh"), *(found for found in quoted(page) if COMMAND.fullmatch(found)), *settings]:
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
        assert not re.search(r"[\[\]{}()*?#<>]", bare), f"{page}: {line}: expected quotes"


@each_page
def test_named_keys_exist(page: Path) -> None:
    known = set(re.findall(r"^\| `([a-z_.]+)` \|", key_tables(), flags=re.MULTILINE))
    known |= {key.rpartition(".")[0] for key in known}
    for found in quoted(page):
        key = re.match(rf"'?((?:{'|'.join(SECTIONS)})\.[a-z_.]+?)(?:[=:].*|'|$)", found)
        assert key is None or key[1] in known or found.endswith((".html", ".json")), f"{page}: {found}: no such key"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@each_page
def test_named_files_exist(page: Path) -> None:
    for link in quoted(page):
        if re.fullmatch(r"(?:configs|launch|irdscale|tests)/[\w./-]+", link):
            assert (ROOT / link).exists(), link


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 180


def test_the_table_of_keys_is_up_to_date() -> None:
    expected = page_with(key_tables())
    assert PAGE.read_text() == expected, f"{PAGE} is out of date; run python -m tests.config_keys"


def run_python(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    (code,) = blocks(page, "python")
    names: dict[str, Any] = {}
    exec(compile(code, str(page), "exec"), names)
    return names


def test_the_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_python(README, tmp_path, monkeypatch)
    assert names["mask"].k == 2000
    assert sum(p.numel() for p in names["model"].parameters() if p.requires_grad) == 2000
    assert not any("values" in name for name, _ in names["plain"].named_parameters())


def test_the_python_example_with_a_new_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_python(ROOT / "irdscale/sparse/README.md", tmp_path, monkeypatch)
    assert names["mask"].k == 2000
    assert sum(p.numel() for p in names["model"].parameters() if p.requires_grad) == 2000 + 2 * 64
    assert names["plain"].score.weight.requires_grad
    assert not any("values" in name for name, _ in names["plain"].named_parameters())
