"""The masks of a search, and of the random samples that it is compared with, by slower ways to the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from irdscale import Fisher, Mask, accumulate_fisher, top_k
from irdscale.config import RunConfig
from irdscale.config_file import dump_config, load_config
from irdscale.errors import InputError
from irdscale.fisher.lattice import rank_samples
from irdscale.fisher.pool import draw_samples
from irdscale.report import write_report
from irdscale.search.folder import refuse_changes
from irdscale.search.ird import Pair
from irdscale.search.kept import keep_mask, load_mask, mask_folder
from irdscale.search.ledger import Ledger, read_ledger
from irdscale.search.masks import random_draw_mask, search_masks
from irdscale.search.run import run_search
from irdscale.tasks import build_model, load_task
from irdscale.verbs import run_fisher
from tests.search.toy import killed_after, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("masks")


def configured(folder: Path, output: Path, *overrides: str) -> RunConfig:
    return load_config(write_config(folder), [f"output={output}", "fisher.dtype=float64", *overrides])


class Slow:
    """The samples of a purpose one by one."""

    def __init__(self, config: RunConfig, count: int, purpose: str = "pool") -> None:
        self.task = load_task(config)
        self.model, self.new = build_model(config, self.task, 0)
        self.rows = [self.task.train[i] for i in draw_samples(config, self.task, count, purpose)]

    def fisher(self, places: Any) -> Fisher:
        rows, exclude = [self.rows[i] for i in places], [f"^{name}$" for name in self.new]
        options: dict[str, Any] = {"batch_size": 4, "exclude": exclude, "dtype": torch.float64}
        return accumulate_fisher(self.model, rows, collate_fn=self.task.collate, **options)

    def unit(self, places: Any) -> dict[str, Tensor]:
        """The sum of each sample's squared gradient over its own trace."""
        singles = [self.fisher([i]) for i in places]
        names = singles[0].diagonal
        return {name: sum(one.diagonal[name] / one.sample_trace[0] for one in singles) for name in names}


def assert_nearly(mask: Mask, scores: dict[str, Tensor]) -> None:
    wanted = top_k(Fisher(scores, torch.zeros(0, dtype=torch.float64)), mask.k)
    entries = [{(n, i) for n, index in m.indices.items() for i in index.tolist()} for m in (mask, wanted)]
    assert len(entries[0] & entries[1]) >= 0.99 * mask.k, "but for the rounding of near ties"


def test_without_options_masks_are_the_ones_of_the_paper(folder: Path, tmp_path: Path) -> None:
    config = configured(folder, tmp_path)
    slow = Slow(config, 16)
    masks = search_masks(config, slow.task, tmp_path, progress=False)
    traces = slow.fisher(range(16)).sample_trace.tolist()
    order = sorted(range(16), key=lambda i: -traces[i])
    assert json.loads((tmp_path / "fisher/traces.json").read_text())["order"] == order
    assert {pair.samples for pair in masks.masks} == {16, 8, 4}
    for pair, mask in masks.masks.items():
        # Batches of 4 are the same ones, so that not even rounding differs.
        assert top_k(slow.fisher(order[: pair.samples]), pair.params).hash == mask, pair
    assert masks.facts["sample_gradients"] == 32


def test_layerwise_everywhere(folder: Path, tmp_path: Path) -> None:
    plain = configured(folder, tmp_path)
    config = configured(folder, tmp_path, "fisher.scope=layerwise")
    slow = Slow(config, 16)

    def expected(chosen: Any, p: int, of: Slow = slow) -> str:
        return top_k(of.fisher(chosen), p, "layerwise").hash

    other = search_masks(plain, slow.task, tmp_path, progress=False)
    masks = search_masks(config, slow.task, tmp_path, progress=False)
    order = json.loads((tmp_path / "fisher/traces.json").read_text())["order"]
    for pair, mask in masks.masks.items():
        assert mask == expected(order[: pair.samples], pair.params) != other.masks[pair], pair
    drawn = random_draw_mask(config, slow.task, tmp_path, Pair(6, 200), progress=False)
    assert drawn["mask"] == expected(range(6), 200, Slow(config, 6, "fish"))
    found = Mask.load(run_fisher(config, progress=False)["mask"])
    assert found.hash == expected(range(16), found.k)
    assert max(len(found.indices[n]) / torch.Size(found.shapes[n]).numel() for n in found.indices) < 0.2


@pytest.mark.parametrize("direction", ["ird", "random"])
def test_equal_samples_everywhere(folder: Path, tmp_path: Path, direction: str) -> None:
    config = configured(folder, tmp_path, "fisher.equal_samples=true", f"search.direction={direction}")
    slow = Slow(config, 16)
    masks = search_masks(config, slow.task, tmp_path, progress=False)
    stored = json.loads((tmp_path / "fisher/traces.json").read_text())
    assert stored["trace"] == pytest.approx(slow.fisher(range(16)).sample_trace.tolist(), rel=1e-4)
    for s in (16, 4):
        mask = Mask.load(mask_folder(tmp_path, masks.masks[Pair(s, masks.start.params)]))
        assert_nearly(mask, slow.unit(stored["order"][:s]))
    assert masks.facts["sample_gradients"] == 32
    if direction == "ird":
        drawn = random_draw_mask(config, slow.task, tmp_path, Pair(6, 200), progress=False)
        assert_nearly(Mask.load(mask_folder(tmp_path, drawn["mask"])), Slow(config, 6, "fish").unit(range(6)))
        assert drawn["sample_gradients"] == 12
        found = run_fisher(config, progress=False)
        assert_nearly(Mask.load(found["mask"]), slow.unit(range(16)))
        written = json.loads((tmp_path / "traces.json").read_text())["trace"]
        assert written == pytest.approx(stored["trace"], rel=1e-4)
    assert not list((tmp_path / "fisher").glob("state-*")), "what was kept of the passes is removed"


def test_both_halves_are_candidates_at_every_size(folder: Path, tmp_path: Path) -> None:
    config = configured(
        folder, tmp_path, "search.direction=both", "search.max_rounds=2", "search.seeds=[0]", "train.steps=4"
    )
    result = run_search(config, progress=False)
    slow = Slow(config, 16)
    order = json.loads((tmp_path / "fisher/traces.json").read_text())["order"]
    traces = slow.fisher(range(16)).sample_trace.tolist()
    assert order == sorted(range(16), key=lambda i: -traces[i])
    stored = json.loads((tmp_path / "fisher/masks.json").read_text())["masks"]
    masks = {Pair(s, p, *begin): mask for s, p, mask, *begin in stored}
    sets = {(pair.begin, pair.samples) for pair in masks}
    assert sets == {(0, 16), (0, 8), (8, 8), (0, 4), (4, 4), (8, 4), (12, 4)}
    for pair, mask in masks.items():
        chosen = order[pair.begin : pair.begin + pair.samples]
        assert top_k(slow.fisher(chosen), pair.params).hash == mask, pair
    assert result["sample_gradients"] == 16 + 16 * (1 + 2 / 2)
    records = [r for r in read_ledger(tmp_path / "ledger.jsonl") if r["round"] == 1]
    assert {r["direction"] for r in records} == {"both"}
    assert [r["samples"] for r in records] == [8, 8, 16, 8, 8]
    assert len({r["mask"] for r in records}) == 5
    best = result["best"]
    begin = best.get("begin", 0)
    assert Path(best["mask"]).name == masks[Pair(best["samples"], best["params"], begin)]
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| 8 from place 8 |" in text
    assert search_masks(config, slow.task, tmp_path, progress=False).masks == masks
    assert not list((tmp_path / "fisher").glob("state-*"))


@pytest.mark.parametrize("direction", ["ird", "both"])
def test_more_than_halves_are_kept(folder: Path, tmp_path: Path, direction: str) -> None:
    asked = ["search.keep=0.7", "search.max_rounds=2", "search.seeds=[0]", "train.steps=4", "search.min_samples=1"]
    config = configured(folder, tmp_path, f"search.direction={direction}", *asked)
    sets = {(0, 16), (0, 11), (0, 7)} | ({(5, 11), (4, 7), (5, 7), (9, 7)} if direction == "both" else set())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "append", killed_after(3, Ledger.append))
        with pytest.raises(KeyboardInterrupt):
            run_search(config, progress=False)
    before = read_ledger(tmp_path / "ledger.jsonl")
    result = run_search(config, progress=False)
    records = read_ledger(tmp_path / "ledger.jsonl")
    assert records[: len(before)] == before
    assert len({r["key"] for r in records}) == len(records), "nothing is done twice"
    stored = json.loads((tmp_path / "fisher/masks.json").read_text())
    masks = {Pair(s, p, *begin): mask for s, p, mask, *begin in stored["masks"]}
    assert {(pair.begin, pair.samples) for pair in masks} == sets, "what two rounds can come to, and no more"
    k = result["path"][0]["params"]
    assert {pair.params for pair in masks} == {k, k * 7 // 10, k * 7 // 10 * 7 // 10}
    first = [(r["samples"], r["params"]) for r in records if r["round"] == 1]
    parts = [(11, k)] * (len(sets) // 3) + [(16, k * 7 // 10)] + [(11, k * 7 // 10)] * (len(sets) // 3)
    assert first == parts
    slow, order = Slow(config, 16), json.loads((tmp_path / "fisher/traces.json").read_text())["order"]
    for pair in masks:
        chosen = order[pair.begin : pair.begin + pair.samples]
        assert_nearly(Mask.load(mask_folder(tmp_path, masks[pair])), slow.fisher(chosen).diagonal)
    write_report(tmp_path)
    assert "Each round keeps 70 % of the samples, the parameters, or both" in (tmp_path / "report.html").read_text()


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    task = {"dataset": "a", "kind": "causal-lm", "columns": {"text": ["text"]}}
    values: dict[str, Any] = {"model": {"path": "a"}, "task": task}
    (tmp_path / "config.yaml").write_text(dump_config(RunConfig.model_validate(values)))
    for scope in (None, "layerwise"):
        refuse_changes(RunConfig.model_validate(values | {"fisher": {"scope": scope}}), tmp_path)
    with pytest.raises(InputError, match=r"fisher.scope: layerwise -> global"):
        refuse_changes(RunConfig.model_validate(values | {"fisher": {"scope": "global"}}), tmp_path)
    for text, said in (
        ("search: {gone: 1}", r"config.yaml:1: search.gone: unknown key"),
        ("no sections", "config.yaml: found no sections"),
        ("{", "config.yaml:1: not YAML"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(InputError, match=said):
            refuse_changes(RunConfig.model_validate(values), tmp_path)


def test_options_of_the_ranking_reach_it(folder: Path, tmp_path: Path) -> None:
    config = configured(folder, tmp_path, "search={rank_by: loss, balance: true, drop_top: 0.2, ratio: 0.05}")
    slow = Slow(config, 16)
    search_masks(config, slow.task, tmp_path, progress=False)
    with torch.no_grad():
        losses = [slow.model(**slow.task.collate([row])).loss.double() for row in slow.rows]
    values = slow.fisher(range(16)).sample_trace / torch.stack(losses)
    labels = [row["labels"] for row in slow.rows]
    order = json.loads((tmp_path / "fisher/traces.json").read_text())["order"]
    assert order == rank_samples(values, "ird", 0, classes=labels, drop_top=0.2)
    assert {labels[i] for i in order[:2]} == {0, 1}


def test_a_mask_that_another_job_saves_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found in its place when this one's would take it, and stays."""
    mask = Mask({"w": torch.tensor([1, 3], dtype=torch.int32)}, {"w": (4,)})
    save, folder = Mask.save, mask_folder(tmp_path, mask.hash)

    def late(self: Mask, target: Path) -> None:
        save(self, target)
        if target != folder:
            save(self, folder)

    monkeypatch.setattr(Mask, "save", late)
    assert keep_mask(mask, tmp_path) == mask.hash
    assert load_mask(tmp_path, mask.hash).hash == mask.hash
    assert [path.name for path in folder.parent.iterdir()] == [mask.hash]
