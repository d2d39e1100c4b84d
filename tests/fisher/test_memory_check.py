"""Sums that do not fit in memory."""

from __future__ import annotations

import pytest

from irdscale.errors import InputError
from irdscale.fisher import memory_check
from tests.fisher.oracle import accumulate
from tests.tiny_models import samples, tiny


def test_sums_that_do_not_fit_are_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny("bert"), samples()
    numels = [p.numel() for p in model.parameters()]
    needed = 8 * (sum(numels) + max(numels))
    monkeypatch.setattr(memory_check, "free_main_memory", lambda: needed)
    accumulate(model, rows)
    monkeypatch.setattr(memory_check, "free_main_memory", lambda: needed - 1)
    with pytest.raises(
        InputError, match=r"fisher\.layout: found sums of .*[KM]iB per rank .* 'sharded' over 2 or more"
    ):
        accumulate(model, rows)
    shapes = {"large": (1000, 1000), "small": (10,)}
    for free in (8.1e6, 9e6, 11e6):
        ranks = memory_check.ranks_needed(shapes, 4, free)
        assert ranks is not None
        assert memory_check.bytes_needed(shapes, 4, "sharded", ranks) <= free
        assert ranks == 2 or memory_check.bytes_needed(shapes, 4, "sharded", ranks - 1) > free
    assert memory_check.ranks_needed(shapes, 4, 8e6) is None
