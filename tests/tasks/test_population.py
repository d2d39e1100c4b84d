"""Populations shaped by `task.pool`: their shares, what is altered in them, and that nothing else is."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from irdscale.config.loader import load_config, settings_of_ranks
from irdscale.config.schema import RunConfig
from irdscale.config.task import TaskConfig
from irdscale.errors import InputError
from irdscale.fisher.pool import draw_samples, traces_of
from irdscale.tasks import Task, load_task
from irdscale.tasks.population import _most
from irdscale.tasks.sources import find_source
from tests.helpers import tiny_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SST2 = CONFIGS / "data/glue/sst2"
SHAKESPEARE, WIKITEXT = CONFIGS / "data/lm/shakespeare", CONFIGS / "data/lm/wikitext2"
CLASSES = {"kind": "sequence-classification", "columns": {"text": ["text"], "label": "label"}}
NUMBERS = {**CLASSES, "kind": "regression"}
TEXTS = {"kind": "causal-lm", "columns": {"text": ["text"]}}
SPLITS = ("train", "selection", "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


def load(model: Path, dataset: Path, pool: dict[str, Any] | None, samples: int = 8, **task: Any) -> Task:
    values = {"dataset": str(dataset), "max_length": 32, "pool": pool, **task}
    return load_task(
        RunConfig.model_validate(
            {
                "model": {"path": str(model)},
                "task": values,
                "fisher": {"samples": samples},
                "search": {"min_samples": 1},
            }
        )
    )


def write(folder: Path, labels: list[Any], word: str = "film") -> Path:
    """A data set of these labels in all splits; text i has i % 16 + 1 words."""
    folder.mkdir(exist_ok=True)
    rows = [{"text": " ".join([word] * (i % 16 + 1)), "label": label} for i, label in enumerate(labels)]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def lengths(data: Any) -> list[int]:
    return [len(ids) for ids in data["input_ids"]]


def within_one(count: int, share: float, size: int) -> bool:
    return abs(count - share * size) < 1


def test_a_group_makes_up_its_share_of_as_many_as_there_are() -> None:
    for share in (0.03, 0.25, 0.5, 0.9, 0.99):
        for first, second in ((0, 5), (1, 1), (7, 100), (100, 7), (64, 64)):
            taken = _most(share, first, second)
            size = sum(taken)
            assert taken[0] <= first
            assert taken[1] <= second
            assert within_one(taken[0], share, size)
            larger = round(share * (size + 1))
            assert larger > first or size + 1 - larger > second, "one more would fit"


POOLS: list[dict[str, Any]] = [
    {"label_skew": {"label": "positive", "share": 0.9}},
    {"length_skew": {"keep": "longest", "share": 0.8}},
    {"copies": {"of": 8, "share": 0.5}},
    {"mixed_with": {"dataset": str(SST2), "share": 0.7}},
    {"label_noise": 0.3},
]


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: next(iter(pool)))
def test_what_is_trained_on_and_measured_stays_as_it_is(model: Path, pool: dict[str, Any]) -> None:
    options: dict[str, Any] = {"limit": {"train": 100, "selection": 20, "test": 20}}
    plain, shaped, again = (load(model, SST2, chosen, **options) for chosen in (None, pool, pool))
    other = load(model, SST2, pool, split_seed=1, **options)
    assert plain.population is plain.train
    assert plain.pool_in_words is None
    for split in SPLITS:
        assert getattr(shaped, split)[:] == getattr(plain, split)[:]
    assert shaped.trained is shaped.train
    assert shaped.population.column_names == [*plain.train.column_names, "altered"]
    assert shaped.population[:] == again.population[:]
    assert shaped.population[:] != other.population[:]
    if "mixed_with" not in pool and "label_noise" not in pool:
        by_row = {sample["row"]: sample for sample in plain.train}
        assert all({**by_row[s["row"]], "altered": s["altered"]} == s for s in shaped.population)


@pytest.mark.parametrize("label", [1, "positive"])
def test_label_skew(model: Path, label: Any) -> None:
    task = load(model, SST2, {"label_skew": {"label": label, "share": 0.9}}, limit={"train": 400})
    labels, positive = task.population["labels"], sum(task.train["labels"])
    assert (sum(labels), len(labels)) == (positive, round(positive / 0.9))
    assert within_one(sum(labels), 0.9, len(labels))
    assert len(set(task.population["row"])) == len(labels)
    assert not any(task.population["altered"])
    assert task.pool_in_words == f"90 % of class positive ({positive} of {len(labels)} samples)"


@pytest.mark.parametrize("keep", ["shortest", "longest"])
def test_length_skew(model: Path, tmp_path: Path, keep: str) -> None:
    task = load(model, write(tmp_path, [0, 1] * 80), {"length_skew": {"keep": keep, "share": 0.8}}, **CLASSES)
    ranked = sorted(lengths(task.train), reverse=keep == "longest")
    found = lengths(task.population)
    assert ranked[39] != ranked[40], "the quarter is told by length alone"
    quarter = [length for length in found if (length <= ranked[39]) is (keep == "shortest") or length == ranked[39]]
    assert (len(quarter), len(found)) == (40, 50)
    assert len(set(task.population["row"])) == 50
    assert not any(task.population["altered"])


def test_copies(model: Path, tmp_path: Path) -> None:
    task = load(model, write(tmp_path, [0, 1] * 80), {"copies": {"of": 3, "share": 0.4}}, **CLASSES)
    rows, altered = task.population["row"], task.population["altered"]
    assert within_one(sum(altered), 0.4, len(altered))
    assert [row for row, copy in zip(rows, altered) if not copy] == list(task.train["row"])
    copied = Counter(row for row, copy in zip(rows, altered) if copy)
    # Texts of one word, by row.
    assert sorted(copied) == [0, 16, 32]
    assert max(copied.values()) - min(copied.values()) <= 1
    assert task.pool_in_words == "40 % copies of the 3 shortest samples (107 of 267 samples)"


def test_label_noise_of_classes_never_keeps_the_true_one(model: Path, tmp_path: Path) -> None:
    task = load(model, write(tmp_path, [0, 1, 2] * 60), {"label_noise": 0.5}, **CLASSES)
    true, found, altered = (np.array(c) for c in (task.train["labels"], task.population["labels"],
                                                  task.population["altered"]))  # fmt: skip
    assert list(task.population["row"]) == list(task.train["row"])
    assert altered.sum() == 90
    assert ((true != found) == altered).all()
    pairs = set(zip(true[altered].tolist(), found[altered].tolist()))
    assert len(pairs) == 6, "each of the other classes is drawn"


def test_label_noise_of_numbers_takes_those_of_other_samples(model: Path, tmp_path: Path) -> None:
    labels = [0.5] * 30 + [1.5, 2.5, -1.0] * 10
    task = load(model, write(tmp_path / "a", labels), {"label_noise": 0.3}, **NUMBERS)
    true, found, altered = (np.array(c) for c in (task.train["labels"], task.population["labels"],
                                                  task.population["altered"]))  # fmt: skip
    assert altered.sum() == 18
    assert ((true != found) == altered).all()
    assert set(found.tolist()) <= set(labels)
    assert task.population.features["labels"] == task.train.features["labels"]


def test_equal_numbers_have_no_false_label(model: Path, tmp_path: Path) -> None:
    folder = write(tmp_path, [float(i) for i in range(20)])
    rows = [{"text": "film", "label": 2.0}] * 20
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        InputError, match=r"task\.pool\.label_noise: found 2\.0 in all of the train split; expected two"
    ):
        load(model, folder, {"label_noise": 0.3}, **NUMBERS)


def test_mixed_texts() -> None:
    pool = {"mixed_with": {"dataset": str(WIKITEXT), "columns": {"text": ["text"]}, "share": 0.8}}
    options: dict[str, Any] = {"limit": {"train": 50, "selection": 5, "test": 5}, **TEXTS, "max_length": 512}
    task = load(CONFIGS / "models/stories260K", SHAKESPEARE, pool, **options)
    foreign = task.population.filter(lambda sample: sample["altered"])
    own = task.population.filter(lambda sample: not sample["altered"])
    assert within_one(len(foreign), 0.8, len(task.population))
    assert own["row"][:] == task.train["row"][:], "as many samples as the train split allows"
    alone = load(CONFIGS / "models/stories260K", WIKITEXT, None, **{**options, "limit": {}})
    there = {(sample["row"], tuple(sample["input_ids"])) for split in SPLITS for sample in getattr(alone, split)}
    assert all((sample["row"], tuple(sample["input_ids"])) in there for sample in foreign)
    assert task.pool_in_words is not None
    assert task.pool_in_words.startswith("80 % from wikitext2 (")


def test_mixed_numbers(model: Path, tmp_path: Path) -> None:
    own = write(tmp_path / "own", [i / 10 for i in range(60)])
    other = write(tmp_path / "other", [9.0 + i for i in range(20)], "dog")
    pool = {"mixed_with": {"dataset": str(other), "columns": NUMBERS["columns"], "share": 0.5}}
    task = load(model, own, pool, **NUMBERS)
    # 20 of 41 is half to within one sample, as 20 of 40 is.
    assert [number >= 9 for number in task.population["labels"]] == [False] * 21 + [True] * 20
    assert task.population["altered"][:] == [False] * 21 + [True] * 20


def test_classes_are_told_by_their_names(model: Path, tmp_path: Path) -> None:
    named = write(tmp_path / "named", ["positive", "negative"] * 20)
    numbered = write(tmp_path / "numbered", [1, 0] * 20)
    limit = {"train": 20}
    for folder in (named, numbered):
        pool = {"mixed_with": {"dataset": str(folder), "columns": CLASSES["columns"], "share": 0.5}}
        foreign = load(model, SST2, pool, limit=limit).population.filter(lambda sample: sample["altered"])
        assert [label == 1 - row % 2 for label, row in zip(foreign["labels"], foreign["row"])] == [True] * 20
    # SST-2 says that 1 is positive; here it is negative.
    features = Features({"text": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    turned = Dataset.from_list([{"text": "film", "label": i % 2} for i in range(50)], features=features)
    turned.to_parquet(tmp_path / "turned.parquet")
    pool = {"mixed_with": {"dataset": str(SST2), "share": 0.5}}
    task = load(model, tmp_path / "turned.parquet", pool, **CLASSES)
    foreign = task.population.filter(lambda sample: sample["altered"])
    there = pq.read_table(SST2 / "train.parquet")["label"].to_pylist()
    assert len(foreign) == len(task.train) == 40
    assert [1 - there[row] for row in foreign["row"]] == foreign["labels"][:]


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ({"label_skew": {"label": 2, "share": 0.9}}, "task.pool.label_skew.label: found 2; expected a class by its"),
        ({"label_skew": {"label": -1, "share": 0.9}}, "found -1; expected a class by its name or number, 0 to 1"),
        ({"label_skew": {"label": "postive", "share": 0.9}}, "found 'postive' (did you mean \"positive\"?); expected"),
        ({"copies": {"of": 41, "share": 0.9}}, "task.pool.copies.of: found 41; expected at most 40, the size of the"),
        ({"length_skew": {"keep": "longest", "share": 0.9}},
         "fisher.samples: found 12; expected at most 11, the population that task.pool leaves: 90 % of the longest "
         "quarter of the train split (10 of 11 samples)"),
        ({"mixed_with": {"dataset": "./none", "share": 0.5}}, "task.pool.mixed_with.dataset: ./none: no such file"),
        ({"mixed_with": {"dataset": str(WIKITEXT), "share": 0.5}}, "task.pool.mixed_with.columns: missing; expected"),
        ({"mixed_with": {"dataset": str(WIKITEXT), "columns": CLASSES["columns"], "share": 0.5}},
         "task.pool.mixed_with.columns.label: "),
        ({"mixed_with": {"dataset": str(SST2), "subset": "a", "share": 0.5}}, "task.pool.mixed_with.subset: found 'a'"),
        ({"mixed_with": {"dataset": str(SST2.parent / "stsb"), "share": 0.5}},
         "task.pool.mixed_with: task.kind: found 'sequence-classification'; expected 'regression' for glue/stsb"),
        ({"mixed_with": {"dataset": str(SST2.parent / "cola"), "share": 0.5}},
         "found the classes unacceptable, acceptable; expected the task's, negative, positive"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_data_is_one_line(model: Path, pool: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        load(model, SST2, pool, samples=12, limit={"train": 40})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_copies_may_be_more_than_the_train_split(model: Path) -> None:
    pool = {"copies": {"of": 8, "share": 0.5}}
    assert len(load(model, SST2, pool, samples=80, limit={"train": 40}).population) == 80
    with pytest.raises(InputError, match=r"fisher\.samples: found 81; expected at most 80, .* task\.pool leaves: 50 %"):
        load(model, SST2, pool, samples=81, limit={"train": 40})


def test_a_kind_that_the_data_set_decides(model: Path) -> None:
    task = TaskConfig.model_validate({"dataset": str(SST2.parent / "stsb"), "pool": POOLS[0]})
    with pytest.raises(InputError, match=r"task\.pool\.label_skew: found with kind 'regression'; expected kind 'seq"):
        find_source(task)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("task.pool={}", "task.pool: found none; expected one of label_skew, length_skew, copies, mixed_with, label_n"),
        ("task.pool.label_noise=1", "task.pool.label_noise: found 1; expected less than 1"),
        ("task.pool.label_noise=0", "task.pool.label_noise: found 0; expected greater than 0"),
        ("task.pool={label_skw: {share: 0.5}}", 'task.pool.label_skw: unknown key (did you mean "label_skew"?)'),
        ("task.pool.label_skew={label: [1], share: 0.5}", "task.pool.label_skew.label: found [1]; expected the number"),
        ("task.pool.label_skew={label: yes, share: 0.5}", "task.pool.label_skew.label: found True; expected the numb"),
        ("task.pool.label_skew={label: 1}", "task.pool.label_skew.share: missing; expected a value"),
        ("task.pool.length_skew={keep: long, share: 0.5}", "task.pool.length_skew.keep: found 'long'"),
        ("task.pool.copies={of: 0, share: 0.5}", "task.pool.copies.of: found 0; expected greater than or equal to 1"),
        ("task={kind: regression, dataset: a, pool: {label_skew: {label: 1, share: 0.5}}}",
         "task.pool.label_skew: found with kind 'regression'; expected kind 'sequence-classification'"),
        ("task={kind: causal-lm, dataset: a, pool: {label_noise: 0.5}}",
         "task.pool.label_noise: found with kind 'causal-lm'; expected kind 'sequence-classification' or 'regression'"),
        ("task={kind: causal-lm, dataset: a, pool: {mixed_with: {dataset: b, columns: {label: c}, share: 0.5}}}",
         "task.pool.mixed_with.columns.text: missing; expected text, for kind 'causal-lm'"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_at_once(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: a}\ntask: {dataset: glue/rte}\n")
    with pytest.raises(InputError) as caught:
        load_config(path, [override])
    assert str(caught.value).startswith(f"command line: {expected}")


def test_one_way_at_a_time() -> None:
    for first, second in combinations(POOLS, 2):
        with pytest.raises(ValueError, match=f"found {next(iter(first))} and {next(iter(second))}; expected one of"):
            TaskConfig.model_validate({"dataset": "a", "pool": first | second})


def test_where_the_other_data_set_is(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: a}\ntask: {dataset: b, pool: {mixed_with: {dataset: ./c, share: 0.5}}}\n")
    config = load_config(path)
    assert config.task.pool is not None
    assert config.task.pool.mixed_with is not None
    assert config.task.pool.mixed_with.dataset == str(tmp_path / "c")
    facts = settings_of_ranks(config, None)
    assert "task.pool.mixed_with.dataset" not in facts
    assert facts["task.pool.mixed_with.share"] == "0.5"
    assert settings_of_ranks(load_config(path, ["task.pool=null"]), None)["task.pool"] == "null"


def test_traces_say_which_samples_are_altered(model: Path) -> None:
    import torch

    values = {
        "model": {"path": str(model)},
        "task": {"dataset": str(SST2), "limit": {"train": 20}, "pool": {"copies": {"of": 2, "share": 0.5}}},
        "fisher": {"samples": 30},
    }
    config = RunConfig.model_validate(values)
    task = load_task(config)
    places = draw_samples(config, task, 30, "pool")
    assert len(set(places)) == 30
    assert max(places) >= len(task.train), "copies are drawn too"
    found = traces_of(task, places, torch.zeros(30))
    assert found["altered"] == [place >= 20 for place in places]
    plain = config.model_copy(update={"task": config.task.model_copy(update={"pool": None})})
    plain = plain.model_copy(update={"fisher": plain.fisher.model_copy(update={"samples": 8})})
    assert "altered" not in traces_of(load_task(plain), [0, 1], torch.zeros(2))
