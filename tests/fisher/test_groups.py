"""Masks of passes over groups of parameters: those of one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.config.schema import RunConfig
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.checkpoint import SavedPass
from irdscale.fisher.memory_check import bytes_needed, fewest, groups_for
from irdscale.fisher.nested import ranked_entries_by_prefix
from irdscale.fisher.pool import ranked_entries
from irdscale.utils.groups import divided
from tests.tiny_models import collate, samples, tiny

SIZES, K = [8, 4, 2], 500


def _gradients(family: str) -> SampleGradients:
    model = tiny(family, "lm" if family == "llama" else "classification")
    rows = samples("lm" if family == "llama" else "classification")
    return SampleGradients(model, rows, collate, scored_parameters(model), batch_size=3)


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("score", ["fisher", "saliency"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_masks_are_those_of_one_pass(family: str, score: Any, scope: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"score": score, "scope": scope}
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    expected_traces, traces = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    one = _gradients(family)
    expected = ranked_entries_by_prefix(one, order, SIZES, K, traces=expected_traces, **options)
    many = _gradients(family)
    groups = divided(many.shapes, 3)
    assert [name for group in groups for name in group] == list(many.scored)
    found = ranked_entries_by_prefix(
        many,
        order,
        SIZES,
        K,
        groups=groups,
        traces=traces,
        saved=[SavedPass(tmp_path / str(place), 0.0) for place in range(3)],
        **options,
    )
    for size in SIZES:
        assert torch.equal(found[size].parameter, expected[size].parameter)
        assert torch.equal(found[size].index, expected[size].index)
        assert found[size].prefix(77).hash == expected[size].prefix(77).hash
    torch.testing.assert_close(traces, expected_traces, rtol=1e-9, atol=0)
    assert many.taken == 3 * one.taken
    assert not list(tmp_path.iterdir())


def test_as_few_passes_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {f"layer{i}": (10, 10) for i in range(8)}
    assert [len(group) for group in divided(shapes, 3)] == [3, 2, 3]
    assert divided(shapes, 1) == [list(shapes)]
    room = bytes_needed({name: shapes[name] for name in list(shapes)[:3]}, 4, "replicated", 1)
    assert fewest(shapes, lambda group: bytes_needed(group, 4, "replicated", 1) <= room) == 3
    assert fewest(shapes, lambda group: True) == 1
    assert fewest(shapes, lambda group: False) == 8
    gradients = _gradients("llama")
    needed = bytes_needed(gradients.shapes, 4, "replicated", 1)
    for free, passes in ((10 * needed, 1), (needed, 2)):
        monkeypatch.setattr("irdscale.fisher.memory_check.free_main_memory", lambda free=free: free)
        assert len(groups_for(gradients, "auto", torch.float32, "replicated", False)) == passes
    assert len(groups_for(gradients, 4, torch.float32, "replicated", False)) == 4


def test_the_passes_of_a_configuration(tmp_path: Path) -> None:
    found = {}
    for passes in (1, 3):
        sections: dict[str, Any] = {
            "model": {"path": "x"},
            "task": {"dataset": "x", "kind": "causal-lm"},
            "fisher": {"samples": 8, "passes": passes},
            "output": str(tmp_path),
        }
        gradients = _gradients("llama")
        rankings = ranked_entries(RunConfig.model_validate(sections), gradients, range(8), SIZES, K, "masks")
        found[passes] = [rankings[size].prefix(K).hash for size in SIZES]
        assert gradients.taken == 8 * passes
    assert found[3] == found[1]
    assert not list((tmp_path / "fisher").glob("state-masks-part-*"))
