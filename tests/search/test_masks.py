"""The masks of a search, and of the random samples that it is compared with, by slower ways to the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale import Fisher, Mask, accumulate_fisher, top_k
from irdscale.config.loader import dump_config, load_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.fisher import SampleGradients
from irdscale.fisher.nested import rank_samples, ranked_entries_by_prefix
from irdscale.fisher.pool import draw_samples, scored_of
from irdscale.models.build import build_model
from irdscale.search.folder import refuse_changes
from irdscale.search.ird import Pair
from irdscale.search.mask_store import keep_mask, load_mask, mask_folder
from irdscale.search.masks import drawn_mask, random_draw_mask, search_masks
from irdscale.tasks import load_task
from irdscale.training.one_mask import run_fisher
from tests.search.toy import write_config


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
    assert not list((tmp_path / "fisher").glob("state-*")), "what was kept of the passes is removed"


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
    config = configured(folder, tmp_path, "search={rank_by: loss, ratio: 0.05}")
    slow = Slow(config, 16)
    search_masks(config, slow.task, tmp_path, progress=False)
    with torch.no_grad():
        losses = [slow.model(**slow.task.collate([row])).loss.double() for row in slow.rows]
    values = slow.fisher(range(16)).sample_trace / torch.stack(losses)
    order = json.loads((tmp_path / "fisher/traces.json").read_text())["order"]
    assert order == rank_samples(values, "ird", 0)


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


@pytest.mark.parametrize("score", ["gem", "gallop", "activation", "magnitude"])
def test_a_mask_by_another_score_is_that_of_the_pool(score: str, folder: Path, tmp_path: Path) -> None:
    config = configured(folder, tmp_path, f"fisher.score={score}")
    slow = Slow(config, 16)
    hashed, k = drawn_mask(config, slow.task, tmp_path, score)
    scored = scored_of(config, slow.model, slow.new, False)
    gradients = SampleGradients(slow.model, slow.rows, slow.task.collate, scored, batch_size=4)
    expected = ranked_entries_by_prefix(gradients, range(16), [16], k, score=config.fisher.score, dtype=torch.float64)
    assert load_mask(tmp_path, hashed).hash == hashed == expected[16].prefix(k).hash
    assert k == round(config.search.ratio * sum(p.numel() for p in slow.model.parameters()))
    other = configured(folder, tmp_path / "other", f"fisher.score={score}", "fisher.seed=7")
    assert (drawn_mask(other, slow.task, tmp_path / "other", score)[0] == hashed) is (score == "magnitude")
    assert not list((tmp_path / "fisher").glob("state-*")), "what was kept of the pass is removed"
    assert drawn_mask(config, slow.task, tmp_path, score) == (hashed, k)


def test_a_head_that_counts_makes_the_mask_smaller(folder: Path, tmp_path: Path) -> None:
    """Mask and head together are the share of the model that `search.ratio` names, as in FISH's script."""
    config = configured(folder, tmp_path, "search.count_head=true")
    slow = Slow(config, 16)
    sizes = {name: p.numel() for name, p in slow.model.named_parameters()}
    head = sum(sizes[name] for name in slow.new)
    masks = search_masks(config, slow.task, tmp_path, progress=False)
    assert masks.start.params + head == round(config.search.ratio * sum(sizes.values()))
    assert masks.start.params == run_fisher(config.model_copy(update={"output": str(tmp_path / "mask")}))["params"]
    ratio = head / 2 / sum(sizes.values())
    few = ["search.count_head=true", f"search.ratio={ratio}", "search.min_ratio=null"]
    small = configured(folder, tmp_path / "small", *few)
    k = round(ratio * sum(sizes.values())) - head
    message = (
        rf"search.ratio: found {ratio}, which gives {k} of \d+ parameters beside {head} of the head; expected 1 to"
    )
    with pytest.raises(InputError, match=message):
        search_masks(small, slow.task, tmp_path / "small", progress=False)
