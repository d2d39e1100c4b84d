"""A whole search on the quantised weights of a GGUF file: on Ray's workers as in one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs ray[tune]")

from irdscale.config.loader import load_config
from irdscale.models.dequantised import cache_folder
from irdscale.search.run import run_search
from tests.gguf_files import tiny_gguf
from tests.quantized import needs_bitsandbytes
from tests.search import ray_toy
from tests.search.toy import finished, write_config

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")


@needs_gguf
@needs_bitsandbytes
def test_workers_find_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # For this process, which has read the variable, and for the workers.
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "cache"))
    ray_toy.two_processors(monkeypatch)
    tiny_gguf(tmp_path / "tiny.gguf")
    toy = write_config(tmp_path, model__path="./tiny.gguf", model__quantize="nf4")
    changes = ["search.max_rounds=1", "search.seeds=[0]", "train.steps=4"]
    found = {}
    for runner in ("local", "ray"):
        output = tmp_path / runner
        run_search(load_config(toy, [*changes, f"search.runner={runner}", f"output={output}"]), progress=False)
        found[runner] = finished(output)
    assert len(found["local"]) > 2
    assert found["ray"] == found["local"]
    # Both searches and all workers read one copy of the dequantised weights.
    assert len(list(cache_folder().glob("*-float32"))) == 1
    assert cache_folder().is_relative_to(tmp_path / "cache")
