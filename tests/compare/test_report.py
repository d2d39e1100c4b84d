"""The report of a comparison shows what compare.json holds."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from irdscale.compare import write_comparison
from irdscale.compare.figures import differences, score_by_parameters, scores
from irdscale.compare.show import print_comparison
from irdscale.errors import InputError
from tests.compare.fake import ALL, around, everything, study, write_study
from tests.pages import Cells


def report(folder: Path, compared: dict[str, Any]) -> tuple[str, Cells]:
    write_comparison(write_study(folder, compared))
    return (folder / "compare.md").read_text(), Cells((folder / "compare.html").read_text())


def test_every_method_is_in_every_table(tmp_path: Path) -> None:
    markdown, page = report(tmp_path, everything())
    assert [
        "IRD",
        "5",
        "0.7200",
        "0.7154 to 0.7246",
        "",
        "",
        "",
        "",
        "0.7300",
        "0.003",
        "520",
        "10",
        "8.4",
    ] in page.rows
    row = ["FISH", "5", "0.7020", "0.6974 to 0.7066", "+0.0180", "+0.0126 to +0.0234", "5-0-0", "<0.001"]
    assert [*row, "0.7120", "0.003", "520", "10", "8.4"] in page.rows
    assert (
        "| FISH | 5 | 0.7020 | 0.6974 to 0.7066 | +0.0180 | +0.0126 to +0.0234 | 5-0-0 | \\<0.001 | 0.7120 |"
        in markdown
    )
    for label, _ in ALL.values():
        assert sum(row[0] == label for row in page.rows) == 1
        assert f"\n| {label} | 5 |" in markdown
    assert ["selection", "436", "half of validation"] in page.rows


def test_measured_costs_are_columns_where_they_are_known(tmp_path: Path) -> None:
    compared = study({"ird": around(0.7), "lora": around(0.6)})
    compared["costs"] = {
        "ird": {"seconds": 12.345, "adapter_bytes": 4321.4, "peak_bytes": None},
        "lora": {"seconds": 10.0, "adapter_bytes": None, "peak_bytes": None},
    }
    _, page = report(tmp_path, compared)
    heads = next(row for row in page.rows if row[0] == "method")
    assert heads[10:] == ["trained parameters", "trainings", "cost", "adapter, bytes", "seconds a training"]
    shown = {row[0]: row[13:] for row in page.rows if row[0] in ("IRD", "LoRA") and len(row) > 13}
    assert shown == {"IRD": ["4,321", "12.3"], "LoRA": ["-", "10"]}


def test_the_population_of_the_samples_is_told(tmp_path: Path) -> None:
    compared = everything()
    compared["task"]["pool"] = "80 % of <class> 1"
    markdown, _ = report(tmp_path, compared)
    assert r"not of the train split: 80 % of \<class\> 1." in markdown
    assert "not of the train split: 80 % of &lt;class&gt; 1." in (tmp_path / "compare.html").read_text()


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    markdown, _ = report(tmp_path, everything())
    lines = markdown.splitlines()
    for head, rows, bars in (("| claim |", 6, 9), ("| method |", len(ALL), 14)):
        start = next(i for i, line in enumerate(lines) if line.startswith(head))
        table = lines[start : start + 2 + rows]
        assert {len(re.findall(r"(?<!\\)\|", line.rstrip())) for line in table} == {bars}
        assert lines[start + 2 + rows] == ""


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("irdscale.compare.report.draw_all", lambda compared: {})


@pytest.mark.usefixtures("no_figures")
def test_claims_come_first(tmp_path: Path) -> None:
    markdown, page = report(tmp_path, study({"ird": around(0.7), "fish": around(0.65, turn=1), "full": around(0.6)}))
    html = (tmp_path / "compare.html").read_text()
    assert page.rows[0][0] == "claim"
    assert page.rows[1] == [
        "IRD over FISH",
        "+0.0500",
        "+0.0414 to +0.0586",
        "5 of 5",
        "<0.001",
        "<0.001",
        "10, 10",
        "holds",
    ]
    for text in (html, markdown):
        assert text.index("What the seeds show") < text.index("What the search cost")


@pytest.mark.usefixtures("no_figures")
def test_no_claims_no_table(tmp_path: Path) -> None:
    markdown, page = report(tmp_path, study({"ird": around(0.7), "full": around(0.6)}))
    assert "What the seeds show" not in markdown
    assert page.rows[0][0] == "method"


def test_claims_fit_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda: console)
    print_comparison(everything(), tmp_path / "x")
    table = stream.getvalue().split("\nThe gain is")[0].splitlines()
    assert table[0] == "What the seeds show"
    assert re.split(r"  +", table[1]) == ["claim", "mean gain", "95 % interval", "wins", "p (Holm)", "verdict"]
    assert max(map(len, table)) <= 80
    assert sum(" over " in line for line in table) == 6


def test_pictures_are_files_and_inside_the_page(tmp_path: Path) -> None:
    markdown, page = report(tmp_path, everything())
    names = re.findall(r"\]\((figures/\w+\.png)\)", markdown)
    assert len(names) == 4
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert len(page.loads) == 4
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not {"link", "script", "iframe"} & set(page.tags)


def test_paths_and_scores_by_seed(tmp_path: Path) -> None:
    written = write_comparison(write_study(tmp_path, study({"ird": [0.7, None], "linear_probe": [0.5, 0.6]})))
    assert set(written) == {"markdown", "html", "csv", "figures"}
    assert all(Path(path).exists() for path in (written["markdown"], written["html"], *written["figures"]))
    rows = list(csv.reader(Path(written["csv"]).read_text().splitlines()))
    assert rows == [
        ["method", "seed", "learning_rate", "samples", "params", "selection", "test"],
        ["ird", "0", "0.003", "64", "520", "0.71", "0.7"],
        ["ird", "1", "0.003", "64", "", "", ""],
        ["linear_probe", "0", "0.003", "", "0", "0.51", "0.5"],
        ["linear_probe", "1", "0.003", "", "0", "0.61", "0.6"],
    ]


def test_failures_and_hostile_names_stay_text(tmp_path: Path) -> None:
    tests: dict[str, list[float | None]] = {"ird": [0.7, 0.71], "fish": [0.6, None], "full": [None, None]}
    hostile = study(tests, name="<script>x</script>|$a$", changes={"fish": {"label": "<b>$x_$|[red]"}})
    markdown, page = report(tmp_path, hostile)
    html = (tmp_path / "compare.html").read_text()
    assert not {"script", "b>$x_$|[red]"} & set(page.tags)
    assert "full fine-tuning, seed 1: TrainingError: the loss is nan &lt;b&gt;" in html
    assert r"failed: full fine-tuning, seed 1: TrainingError: the loss is nan \<b\>" in markdown
    assert r"| \<b\>$x\_$\|\[red\] | 1 |" in markdown
    assert ["IRD over <b>$x_$|[red]", "+0.1000", "-", "1 of 1", "-", "-", "10, 10", "too few seeds"] in page.rows
    assert r"| IRD over \<b\>$x\_$\|\[red\] | +0.1000 |" in markdown
    assert ["full fine-tuning", "0", "failed", "-", "", "", "", "", "failed", "-", "-", "10", "8.4"] in page.rows


@pytest.mark.parametrize("lower", [False, True])
def test_one_seed(tmp_path: Path, lower: bool) -> None:
    markdown, page = report(tmp_path, study({"ird": [0.7], "fish": [0.6]}, lower))
    counts = "0-1-0" if lower else "1-0-0"
    assert ["FISH", "1", "0.6000", "-", "+0.1000", "-", counts, "-", "0.6100", "0.003", "520", "10", "8.4"] in page.rows
    gain = "-0.1000" if lower else "+0.1000"
    wins = "0 of 1" if lower else "1 of 1"
    assert ["IRD over FISH", gain, "-", wins, "-", "-", "10, 10", "too few seeds"] in page.rows
    assert f"| IRD over FISH | {gain} | - | {wins} | - | - | 10, 10 | too few seeds |" in markdown


def test_nothing_but_failures(tmp_path: Path) -> None:
    markdown, page = report(tmp_path, study({"ird": [None, None], "fish": [None, None]}))
    assert "IRD failed for every seed, so there is no comparison." in markdown
    assert page.loads == []


def test_the_better_side_of_the_differences_is_named() -> None:
    for lower, label in (
        (False, "← IRD is worse      IRD minus the method, accuracy      IRD is better →"),
        (True, "← IRD is better      IRD minus the method, loss      IRD is worse →"),
    ):
        figure = differences(study({"ird": around(0.7), "fish": around(0.6)}, lower))
        assert figure is not None
        axes = figure.axes[0]
        assert figure.get_supxlabel() == label
        assert axes.get_xlim()[0] < 0 < axes.get_xlim()[1]


def test_no_two_points_of_one_size_stand_on_each_other() -> None:
    figure = score_by_parameters(everything())
    assert figure is not None
    xs = sorted(container.lines[0].get_xdata()[0] for container in figure.axes[0].containers)
    assert len(xs) == len(ALL) - 1
    assert all(right / left > 1.05 for left, right in itertools.pairwise(xs))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [label for label, _ in ALL.values()]


def test_methods_stand_as_they_are_listed_and_the_base_is_a_line() -> None:
    compared = everything()
    compared["base"] = {"selection": 0.5, "test": 0.51}
    figure = scores(compared)
    assert figure is not None
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [label for label, _ in ALL.values()]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert "the base model" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    compared = study({"ird": [0.7, 0.71], "fish": [0.6, None]}, changes={"fish": {"label": "[red]FISH"}})
    compared["methods"][0]["learning_rate"] = 0.01
    compared["costs"] = {name: {"seconds": 1.0, "adapter_bytes": 9, "peak_bytes": 2**30} for name in ("ird", "fish")}
    print_comparison(compared, tmp_path)
    text = capsys.readouterr().out
    assert re.search(r"\[red\]FISH .*  0\.6000  .*\+0\.1000  +-  +1-0-0", text)
    assert re.search(r"IRD over \[red\]FISH +\+0\.1000  .* 1 of 1  .* too few seeds\n", text)
    assert "Failed: [red]FISH, seed 1: TrainingError: the loss is nan <b>" in text
    assert f"Report: {tmp_path / 'compare.html'}" in text
    assert f"output={tmp_path} 'compare.learning_rates=[0.001,0.003,0.01,0.03]'\n" in text


def _broken(change: Any) -> str:
    compared = study({"ird": [0.7, 0.71], "fish": [0.6, 0.6]})
    change(compared)
    return json.dumps(compared)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a result of a comparison"),
        ("[]", "the file: found \\[\\]; input should be a valid dictionary"),
        ("{}", "task: found nothing; field required"),
        (_broken(lambda s: s["methods"][1].pop("test")), "methods.1.test: found nothing; field required"),
        (_broken(lambda s: s["methods"][0]["seeds"][1].update(test="x")), "methods.0.seeds.1.test: found 'x'; input"),
        (
            _broken(lambda s: s.update(reference="full")),
            "reference: found 'full'; expected one of its methods: ird, fish",
        ),
    ],
)
def test_damaged(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(InputError, match=message):
        write_comparison(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]


def test_unfinished(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"found no compare\.json; expected a finished comparison: run irdscale compare"
    ):
        write_comparison(tmp_path)
