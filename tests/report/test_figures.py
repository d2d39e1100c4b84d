"""Figures of a search: nothing squashed, nothing hidden, nothing without a message."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.patches import Rectangle

from irdscale.report import write_report
from irdscale.report.axes import luminance
from irdscale.report.facts import Facts, gather
from irdscale.report.figures import metric_by_parameters, trace_distribution
from irdscale.report.heat_maps import equal_density, mask_density, mask_overlap, path_of_rounds
from tests.report.fake import write_output


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    return gather(write_output(tmp_path))


def with_result(facts: Facts, **changes: Any) -> Facts:
    return replace(facts, result={**facts.result, **changes})


@pytest.mark.parametrize("probe", [0.01, 5000.0])
def test_a_model_far_off_does_not_squash_the_candidates(tmp_path: Path, probe: float) -> None:
    figure = metric_by_parameters(gather(write_output(tmp_path, probe=probe)))
    assert figure is not None
    figure.draw_without_rendering()
    main = next(axes for axes in figure.axes if axes.get_ylim()[0] < 0.75 < axes.get_ylim()[1])
    low, high = main.get_ylim()
    assert 0.7 * (high - low) < 0.76 - 0.69, "the seeds of the candidates reach from 0.69 to 0.76"
    assert main.get_position().height > 0.4
    assert any(low < probe < high for low, high in (axes.get_ylim() for axes in figure.axes)), "it is still shown"
    lines = [line for axes in figure.axes for line in axes.lines if line.get_label() == "head alone (linear probe)"]
    assert [line.get_ydata()[0] for line in lines] == [probe] * 2


def test_a_single_axis_is_enough_for_close_values(tmp_path: Path) -> None:
    figure = metric_by_parameters(gather(write_output(tmp_path, probe=0.66)))
    assert figure is not None
    assert len(figure.axes) == 1


def test_no_mark_hides_another(facts: Facts) -> None:
    same = [replace(one, metrics={0: 0.75, 1: 0.75}, mean=0.75) for one in facts.rounds]
    baseline = {"fish_random": {**facts.result["baseline"]["fish_random"], "metric": 0.75}}
    figure = metric_by_parameters(with_result(replace(facts, rounds=same), baseline=baseline))
    assert figure is not None
    figure.draw_without_rendering()
    axes = figure.axes[0]
    marks: dict[str, list[Any]] = {"means": [], "seeds": []}
    for found in axes.collections:
        size = found.get_sizes()[0]
        # The ring of the winner is around its mark.
        if size < 300:
            kind = "seeds" if size < 20 else "means"
            marks[kind] += [axes.transData.transform(place) for place in found.get_offsets()]
    assert len(marks["means"]) == 5, "four candidates and FISH"
    assert len(marks["seeds"]) == 8
    for kind, least in (("means", 12), ("seeds", 4)):
        for a, b in itertools.combinations(marks[kind], 2):
            assert max(abs(a - b)) > least, kind


@pytest.mark.parametrize("lower", [False, True])
def test_the_best_cell_is_the_darkest(facts: Facts, lower: bool) -> None:
    figure = path_of_rounds(with_result(facts, task={**facts.result["task"], "lower_is_better": lower}))
    assert figure is not None
    axes = figure.axes[0]
    cells = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_facecolor()[3]]
    shown = {
        float(text.get_text()): luminance(cell.get_facecolor()) for cell, text in zip(cells, axes.texts, strict=True)
    }
    assert set(shown) == {0.70, 0.72, 0.75}
    best, worst = (0.70, 0.75) if lower else (0.75, 0.70)
    assert shown[best] == min(shown.values())
    assert shown[worst] == max(shown.values())


def ticks(figure: Any) -> Iterator[str]:
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            yield axis.get_offset_text().get_text()
            yield from (label.get_text() for label in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)))


def test_ticks_are_plain_numbers(facts: Facts) -> None:
    wide = replace(facts, traces=[(10.0**-i, i < 4) for i in range(8)])
    for figure in (metric_by_parameters(facts), trace_distribution(wide), mask_density(facts)):
        assert figure is not None
        found = list(ticks(figure))
        assert any(found)
        assert not [text for text in found if re.search(r"\$|\d[eE]|×|math", text)]


def test_equal_shares_are_a_sentence_and_no_figure(facts: Facts) -> None:
    equal = replace(facts, layers={0: {"a": 0.02300, "b": 0.02301}, 1: {"a": 0.02299, "b": 0.02302}})
    assert mask_density(equal) is None
    assert equal_density(equal) == "2.3 %"
    assert equal_density(facts) is None


def test_shares_that_are_written_alike_have_one_colour(facts: Facts) -> None:
    close = replace(facts, layers={0: {"a": 0.02301, "b": 0.02299}, 1: {"a": 0.0245, "b": 0.0246}})
    figure = mask_density(close)
    assert figure is not None
    image = figure.axes[0].images[0]
    colors = image.cmap(image.norm(image.get_array()))
    assert colors[0, 0].tolist() == colors[0, 1].tolist(), "2.301 and 2.299 are both written 2.3"
    assert abs(luminance(colors[0, 0]) - luminance(colors[1, 0])) < 0.1, "2.3 and 2.5 are close"


def test_figures_with_nothing_to_show_are_left_out(facts: Facts) -> None:
    assert trace_distribution(replace(facts, traces=[(1.0, True)] * 5)) is None
    alone = replace(facts, rounds=facts.rounds[:1])
    assert path_of_rounds(alone) is None
    bare = {"fish_random": {**facts.result["baseline"]["fish_random"], "metric": None}}
    assert metric_by_parameters(with_result(alone, baseline=bare)) is None
    assert mask_overlap(replace(facts, analysis=replace(facts.analysis, overlap=None))) is None


def test_a_report_names_no_figure_that_is_left_out(tmp_path: Path) -> None:
    write_output(tmp_path)
    file = tmp_path / "fisher/traces.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trace": [1.0] * 32}))
    write_report(tmp_path)
    assert "traces.png" not in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "All samples have the same trace." in page
    assert "largest first" not in page
