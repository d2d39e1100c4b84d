"""The Fisher of many model families against one backward per sample, and the table in irdscale/fisher/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from irdscale.errors import InputError
from irdscale.fisher import accumulate_fisher
from irdscale.fisher.accumulate import scored_parameters
from irdscale.fisher.exactness import why_no_rules
from tests.fisher.families import classifier, configs, rows_for
from tests.fisher.oracle import brute_force
from tests.tiny_models import collate

README = Path(__file__).resolve().parents[2] / "irdscale" / "fisher" / "README.md"
FAMILIES = tuple(configs())


@pytest.mark.parametrize("family", FAMILIES)
def test_exact(family: str) -> None:
    config = configs()[family]
    rows = rows_for(config)
    try:
        model = classifier(config)
        fisher = accumulate_fisher(model, rows, collate_fn=collate, batch_size=4, dtype=torch.float64)
    except InputError as error:
        stated = f"refused: {error}"
    else:
        expected, traces = brute_force(model, rows)
        for name, value in expected.items():
            # Some models compute their norms in float32, whatever their weights.
            torch.testing.assert_close(fisher.diagonal[name], value, rtol=1e-5, atol=1e-14, msg=name)
        torch.testing.assert_close(fisher.sample_trace, traces, rtol=1e-5, atol=0)
        reason = why_no_rules(model, scored_parameters(model), collate(rows[:2]))
        stated = "exact, in batches" if reason is None else f"exact, one sample at a time: {reason}"
    print(f"\n| {family} | {stated} |")
    row = re.search(rf"^\| {re.escape(family)} \| (.*) \|$", README.read_text(), flags=re.MULTILINE)
    assert row is not None, f"README: expected | {family} | {stated} |"
    assert row[1] == stated
