"""What a comparison tells of its samples, from files that tests know and from those of real passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from irdscale.compare import write_comparison
from irdscale.compare.method_specs import asked_methods, owner_of, ranking_name
from irdscale.compare.samples import Samples, about_samples
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.masks.mask import Mask
from irdscale.search.ird import Pair
from irdscale.search.mask_store import SearchMasks, as_stored, index_file, keep_mask, traces_file
from irdscale.search.masks import search_masks
from irdscale.tasks import load_task
from irdscale.utils.files import write_json
from tests.compare.fake import study, write_study
from tests.pages import Cells
from tests.search.toy import write_config

LENGTHS = [3, 5, 7, 9, 11, 13, 15, 17]
# By seed: traces, and the first entries of the masks of all eight samples and of the first two.
SEEDS = {0: ([8, 7, 6, 5, 4, 3, 2, 1], 0, 2), 1: ([7, 8, 6, 5, 4, 3, 1, 2], 5, 8), 2: ([8, 7, 6, 5, 4, 3, 1, 2], 0, 5)}


def config_of(*methods: str, **changes: Any) -> dict[str, Any]:
    config = {
        "model": {"path": "m"},
        "task": {"dataset": "glue/rte"},
        "fisher": {"samples": 8},
        "search": {"ratio": 0.1, "min_samples": 2},
        "compare": {"methods": list(methods), "seeds": list(SEEDS), **changes},
    }
    return RunConfig.model_validate(config).model_dump(mode="json")


def mask(first: int) -> Mask:
    """Ten entries of a hundred."""
    return Mask({"w": torch.arange(first, first + 10, dtype=torch.int32)}, {"w": (20, 5)})


def write_ranking(output: Path, name: str, seed: int, sign: int = 1, altered: bool = False) -> None:
    trace, whole, first = SEEDS[seed]
    start, fewest = Pair(8, 10), Pair(2, 10)
    hashes = {start: keep_mask(mask(whole), output), fewest: keep_mask(mask(first + (sign < 0)), output)}
    write_json(index_file(output, name), as_stored(SearchMasks(start, fewest, hashes, {}), "a"))
    order = sorted(range(8), key=lambda place: -sign * trace[place])
    known: dict[str, Any] = {
        "row": [seed * 8 + place for place in range(8)],
        "trace": [float(value) for value in trace],
        "length": LENGTHS,
        "loss": [1.0] * 8,
        "label": [0, 1] * 4,
        "order": order,
    }
    if altered:
        known["altered"] = [place in (0, 4) for place in range(8)]
    write_json(traces_file(output, name), known)


def compared(*methods: str, seeds: int = 3, reference: str | None = None, **changes: Any) -> dict[str, Any]:
    tests = dict.fromkeys(methods, [0.7, 0.71, 0.72][:seeds])
    return study(tests, reference=reference or methods[0]) | {"config": config_of(*methods, **changes)}


def progress_listener(output: Path, given: dict[str, Any]) -> Samples:
    found = about_samples(output, given)
    assert found is not None
    return found


def test_means_over_the_seeds(tmp_path: Path) -> None:
    for seed in SEEDS:
        write_ranking(tmp_path, f"ird-{seed}", seed, altered=True)
    found = progress_listener(tmp_path, compared("ird", "fish"))
    rhos = [stats.spearmanr(trace, LENGTHS).statistic for trace, _, _ in SEEDS.values()]
    rows = {row[0]: row[1:] for row in found.rows}
    assert rows["ranking and length"] == [
        "Spearman",
        f"{sum(rhos) / 3:+.2f}",
        f"{min(rhos):+.2f} to {max(rhos):+.2f}",
        "±0.74",
    ]
    assert rows["altered ones of all 8 samples"] == ["share", "25 %", "25 % to 25 %", ""]
    # Of the first two, one is altered with every seed.
    assert rows["altered ones of the first 2"] == ["share", "50 %", "50 % to 50 %", "25 %"]
    assert rows["masks of the first 2 and of all"] == ["shared entries", "66.7 %", "50 % to 80 %", "10 %"]
    # Seeds 0 and 2 have the same mask, seed 1 half of it.
    assert rows["masks of all, of two seeds"] == ["shared entries", "66.7 %", "50 % to 100 %", "10 %"]
    assert found.sentences == [
        "For each of 3 seeds 8 samples were drawn, and ranked as for IRD; figures are means over the seeds.",
        f"The ranking is largely length in disguise: Spearman {sum(rhos) / 3:+.2f} with length.",
    ]


def test_one_seed_has_no_range_and_no_other_draw(tmp_path: Path) -> None:
    write_ranking(tmp_path, "ird-1", 1)
    given = compared("ird", seeds=1) | {"seeds": [1]}
    found = progress_listener(tmp_path, given)
    assert [row[3] for row in found.rows] == ["-"] * len(found.rows)
    assert found.sentences[0] == "For one seed 8 samples were drawn, and ranked as for IRD."
    assert not [row[0] for row in found.rows if "two seeds" in row[0] or "altered" in row[0]]


def test_a_relation_that_one_seed_does_not_show_is_weak(tmp_path: Path) -> None:
    for seed in SEEDS:
        write_ranking(tmp_path, f"ird-{seed}", seed)
    shuffled = json.loads(traces_file(tmp_path, "ird-1").read_text())
    write_json(traces_file(tmp_path, "ird-1"), shuffled | {"length": [9, 3, 17, 5, 11, 15, 7, 13]})
    said = progress_listener(tmp_path, compared("ird")).sentences[1]
    assert said.startswith("The ranking follows length a little, more than by chance: Spearman -0.75 with length, by")
    assert "There is no sign that the ranking is class in disguise" in said


def test_whose_ranking_it_is(tmp_path: Path) -> None:
    for seed in SEEDS:
        write_ranking(tmp_path, f"reverse-{seed}", seed, sign=-1)
        write_ranking(tmp_path, f"ird-{seed}", seed)
        write_ranking(tmp_path, f"by_length-{seed}", seed)
    ranked = {"lora": "reverse IRD", "fish": "FISH", "reverse": "reverse IRD", "by length": "by length"}
    variants = {"by length": ["ird", "search.rank_by=length"]}
    for reference, label in ranked.items():
        given = compared("lora", "reverse", "ird", "fish", reference="lora", variants=variants)
        more = given["methods"][0] | {"name": "by length"}
        given["config"] = config_of("lora", "reverse", "ird", "fish", "by length", variants=variants)
        found = progress_listener(tmp_path, given | {"reference": reference, "methods": [*given["methods"], more]})
        assert f"ranked as for {label};" in found.sentences[0]
        # FISH, which has no folder of its own, shares IRD's.
        shared = {row[0]: row[2] for row in found.rows}["masks of the first 2 and of all"]
        assert shared == ("56.7 %" if "reverse" in label else "66.7 %")


def test_nothing_to_tell(tmp_path: Path) -> None:
    assert about_samples(tmp_path, compared("ird", "fish")) is None, "no files"
    for seed in SEEDS:
        write_ranking(tmp_path, f"ird-{seed}", seed)
        write_ranking(tmp_path, f"fish_small-{seed}", seed)
    assert about_samples(tmp_path, compared("lora", "full")) is None
    assert about_samples(tmp_path, compared("fish_small")) is None, "a shuffle ranks nothing"
    shutil.rmtree(tmp_path / "masks")
    assert about_samples(tmp_path, compared("ird")) is None


def test_what_is_broken_is_told(tmp_path: Path) -> None:
    for seed in SEEDS:
        write_ranking(tmp_path, f"ird-{seed}", seed)
    given, folder = compared("ird"), tmp_path / "fisher/ird-1"
    good = (folder / "traces.json").read_text()
    for text, message in (("{", "not a list of traces"), ("[]", "not the traces of a search"), ("{}", "KeyError")):
        (folder / "traces.json").write_text(text)
        with pytest.raises(InputError, match=rf"ird-1/traces\.json: .*{message}"):
            about_samples(tmp_path, given)
    (folder / "traces.json").write_text(good)
    listed = (folder / "masks.json").read_text()
    (folder / "masks.json").write_text(json.dumps(json.loads(listed) | {"masks": []}))
    with pytest.raises(InputError, match=r"ird-1/masks\.json: not a list of masks"):
        about_samples(tmp_path, given)
    (folder / "masks.json").write_text(listed)
    (tmp_path / "masks" / mask(5).hash / "mask.safetensors").write_text("x")
    with pytest.raises(InputError, match=r"mask\.safetensors"):
        about_samples(tmp_path, given)
    shutil.rmtree(tmp_path / "masks" / mask(8).hash)
    line = f"The samples are unknown: found no {tmp_path.name}/masks/{mask(8).hash}."
    assert about_samples(tmp_path, given) == Samples([line], [])
    (folder / "traces.json").unlink()
    line = "The samples are unknown: found no fisher/ird-1/traces.json."
    assert about_samples(tmp_path, given) == Samples([line], [])


def test_the_pages_show_it(tmp_path: Path) -> None:
    given = write_study(tmp_path, compared("ird", "fish"))
    write_comparison(given)
    assert "## Samples" not in (tmp_path / "compare.md").read_text()
    assert "<h2>Samples" not in (tmp_path / "compare.html").read_text()
    for seed in SEEDS:
        write_ranking(tmp_path, f"ird-{seed}", seed)
    write_comparison(given)
    page = Cells((tmp_path / "compare.html").read_text())
    assert ["masks of all, of two seeds", "shared entries", "66.7 %", "50 % to 100 %", "10 %"] in page.rows
    markdown = (tmp_path / "compare.md").read_text()
    assert "\n| masks of all, of two seeds | shared entries | 66.7 % | 50 % to 100 % | 10 % |" in markdown
    assert "ranked as for IRD; figures are means over the seeds. The ranking is largely length" in markdown


def test_files_of_real_passes(tmp_path: Path) -> None:
    methods = ["fish_small", "ird", "top_samples"]
    config = load_config(write_config(tmp_path, compare={"methods": methods, "seeds": [0, 1]}))
    task, output, asked = load_task(config), Path(config.output), asked_methods(config)
    kept = []
    for seed in (0, 1):
        top = asked[2]
        name = ranking_name(owner_of(asked, top, seed), seed)
        assert name == f"ird-{seed}"
        kept.append(search_masks(top.of_seed(seed), task, output, False, name))
    tests = {name: [0.7, 0.71] for name in methods}
    given = study(tests, reference="top_samples") | {"config": config.model_dump(mode="json")}
    # Where the folder is moved, so it is read.
    moved = output.rename(tmp_path / "moved")
    found = progress_listener(moved, given)
    assert [row[0] for row in found.rows] == [
        *(f"ranking and {name}" for name in ("length", "loss", "class")),
        "masks of the first 4 and of all",
        "masks of all, of two seeds",
    ]
    loaded = [Mask.load(moved / "masks" / one.masks[one.start]) for one in kept]
    entries = [{(name, i) for name, index in one.indices.items() for i in index.tolist()} for one in loaded]
    share = len(entries[0] & entries[1]) / kept[0].start.params
    assert found.rows[-1][2] == f"{100 * share:.3g} %"
    assert "ranked as for largest traces;" in found.sentences[0]
