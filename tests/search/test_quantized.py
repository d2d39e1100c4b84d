"""A whole search on a quantised base: on Ray's workers as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs ray[tune]")

from irdscale.config.loader import load_config
from irdscale.search.run import run_search
from tests.quantized import needs_bitsandbytes
from tests.search import ray_toy
from tests.search.toy import finished, write_config

pytestmark = needs_bitsandbytes


def test_workers_find_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray_toy.two_processors(monkeypatch)
    changes = ["model.quantize=nf4", "search.max_rounds=1", "search.seeds=[0]", "train.steps=4"]
    found = {}
    for runner in ("local", "ray"):
        output = tmp_path / runner
        overrides = [*changes, f"search.runner={runner}", f"output={output}"]
        run_search(load_config(write_config(tmp_path), overrides), progress=False)
        found[runner] = finished(output)
    assert len(found["local"]) > 2
    assert found["ray"] == found["local"]
