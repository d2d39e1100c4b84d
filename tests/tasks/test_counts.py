"""Classes and their counts, and which are rare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from irdscale.cli import command_line
from irdscale.config.schema import RunConfig
from irdscale.tasks import counts, load_task, tell_classes
from tests.helpers import tiny_model
from tests.search.toy import write_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


def said(
    model: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    labels: list[Any],
    names: list[str] | None = None,
    **task: Any,
) -> list[str]:
    """What is logged of a train split with these labels."""
    for split, column in (("train", labels), ("validation", labels), ("test", labels)):
        data = datasets.Dataset.from_dict({"text": ["the film"] * len(column), "label": column})
        if names is not None:
            data = data.cast_column("label", datasets.ClassLabel(names=names))
        data.to_parquet(folder / f"{split}.parquet")
    columns = {"text": ["text"], "label": "label"}
    config = {"dataset": str(folder), "kind": "sequence-classification", "columns": columns, "max_length": 8, **task}
    run = RunConfig.model_validate(
        {"model": {"path": str(model)}, "task": config, "fisher": {"samples": 2}, "search": {"min_samples": 2}}
    )
    shown: list[str] = []
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(counts, "say", shown.append)
    tell_classes(load_task(run), True)
    monkeypatch.undo()
    return [*shown, *(f"{record.levelname} {record.getMessage()}" for record in caplog.records)]


def test_counts_by_name(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert said(model, tmp_path, caplog, [1, 0, 0, 1, 0], ["pos", "neg"]) == ["Classes of train: pos 3, neg 2"]


@pytest.mark.parametrize(
    ("labels", "row", "count", "size", "least"),
    [
        (["a", "b", "b", "rare", "a", "b"], 3, 1, "6", 2),
        (["a", "b"] * 1500 + ["rare", "rare"], 3000, 2, "3,002", 4),
    ],
)
def test_a_rare_class_is_a_warning_with_its_first_row(
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    labels: list[str],
    row: int,
    count: int,
    size: str,
    least: int,
) -> None:
    assert said(model, tmp_path, caplog, labels)[1:] == [
        f"WARNING task.dataset: {tmp_path.name}: class 'rare' has {count} of {size} samples of train, "
        f"first in row {row}; expected {least} or more"
    ]


def test_enough_is_no_warning(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(said(model, tmp_path, caplog, ["a", "b"] * 1498 + ["rare"] * 3)) == 1


def test_classes_that_a_limit_or_the_data_leaves_without_rows(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = said(model, tmp_path, caplog, [0, 1] * 10, ["a", "b", "none"], limit={"train": 10})
    assert found[0].startswith("Classes of train (10 rows drawn from train): a ")
    assert found[1:] == [
        f"WARNING task.dataset: {tmp_path.name}: class 'none' has 0 of 10 samples of train "
        f"(10 rows drawn from train), in no row; expected 2 or more"
    ]


def test_many_rare_classes_are_few_lines(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = said(model, tmp_path, caplog, [f"c{number:02}" for number in range(30)])
    assert len(found) == 10
    assert "(30 in all)" in found[0]
    assert found[-1].endswith("22 more classes are as rare")


@pytest.mark.parametrize("verb", ["fisher", "train", "search"])
def test_verbs_say_it_before_they_work(tmp_path: Path, capfd: pytest.CaptureFixture[str], verb: str) -> None:
    # The mask of this ratio has no entry, which is found out after the data is read.
    config = write_config(tmp_path, search__ratio=1e-9, search__min_ratio=1e-9)
    assert command_line.run([verb, str(config)]) == 2
    assert "Classes of train: 0 32, 1 32" in capfd.readouterr().err
