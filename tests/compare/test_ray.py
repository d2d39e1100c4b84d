"""A toy comparison on Ray, seed by seed, against the local runner: the same trainings, choice and test metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray[tune]")

from irdscale.compare.budget import Budget  # noqa: E402
from irdscale.compare.run import run_compare  # noqa: E402
from irdscale.config.loader import load_config  # noqa: E402
from irdscale.search.ledger import Ledger, read_ledger  # noqa: E402
from tests.search import ray_toy  # noqa: E402
from tests.search.toy import finished, killed_after, write_config  # noqa: E402

# LoRA is left out: it needs another package, and its candidates go the same way as full fine-tuning's.
COMPARED = {
    "methods": ["ird", "fish_best", "random_mask", "full", "brief"],
    "variants": {"brief": ["ird", "search.max_rounds=1"]},
    "learning_rates": [0.003, 0.01],
    "seeds": [0, 1],
}


def progress_listener(result: dict[str, Any]) -> dict[str, Any]:
    """What a comparison found, without times and the runner."""
    return {key: value for key, value in result.items() if key not in ("seconds", "costs", "config")}


def test_ray_and_local_tell_the_same_and_go_on_with_each_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = write_config(tmp_path, compare=COMPARED, search__max_rounds=1, search__min_ratio=0.05, train__steps=4)
    local = load_config(toy, [f"output={tmp_path / 'local'}"])
    expected = run_compare(local, progress=False)
    ray_toy.two_processors(monkeypatch)
    on_ray = load_config(toy, [f"output={tmp_path / 'ray'}", "search.runner=ray"])
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", killed_after(9, Ledger.append))
        with pytest.raises(KeyboardInterrupt):
            run_compare(load_config(toy, [f"output={tmp_path / 'ray'}"]), progress=False)
    begun = read_ledger(tmp_path / "ray" / "ledger.jsonl")
    assert len(begun) == 9
    # Seed by seed, and all of it fits into the time.
    found = run_compare(on_ray, progress=False, budget=Budget(60))
    assert progress_listener(found) == progress_listener(expected)
    records = read_ledger(tmp_path / "ray" / "ledger.jsonl")
    assert records[:9] == begun
    assert len({record["key"] for record in records}) == len(records)
    assert finished(tmp_path / "ray") == finished(tmp_path / "local")
