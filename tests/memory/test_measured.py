"""Planned memory against the peaks of real passes on this machine's processors, within 10 %.

Random Llama-like and BERT-like classifiers of 25 to 30 million parameters, and a Llama-like language model of 45,
in float32; texts are padded to 64 tokens.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from irdscale.config.loader import load_config
from irdscale.plan import run_plan
from tests.memory.measured import make_folder, on_rank
from tests.quantized import KINDS, needs_bitsandbytes

CHECKPOINTING = "train.gradient_checkpointing=true"
ONE: dict[str, tuple[str, list[str]]] = {
    "fisher": ("fisher", []),
    "fisher, checkpointing": ("fisher", [CHECKPOINTING]),
    "training": ("train", []),
    "training, checkpointing": ("train", [CHECKPOINTING]),
}
TWO: dict[str, tuple[str, list[str]]] = {
    "fisher, replicated": ("fisher", []),
    "fisher, sharded": ("fisher", ["fisher.layout=sharded"]),
    "training, DDP": ("train", []),
    "training, DDP, checkpointing": ("train", [CHECKPOINTING]),
}
# Buckets of the shipped files would hide all else.
ZERO = {
    2: {"reduce_bucket_size": 1_000_000, "overlap_comm": True},
    3: {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 100_000},
}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def zero_cases(folder: Path) -> dict[str, tuple[str, list[str]]]:
    cases: dict[str, tuple[str, list[str]]] = {}
    for stage, settings in ZERO.items():
        file = folder / f"zero{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage, **settings}}))
        cases[f"training, ZeRO-{stage}"] = ("train", [f"train.deepspeed={file}"])
        shipped = Path(__file__).parents[2] / "configs" / "deepspeed" / f"zero{stage}.json"
        cases[f"training, shipped ZeRO-{stage}"] = ("train", [f"train.deepspeed={shipped}"])
    partitioned = f"train.deepspeed={folder / 'zero3.json'}"
    cases["training, ZeRO-3, checkpointing"] = ("train", [partitioned, CHECKPOINTING])
    # Of several batches, for weights are gathered ahead from the second on.
    cases["fisher, ZeRO-3, sharded"] = ("fisher", [partitioned, "fisher.layout=sharded", "fisher.batch_size=2"])
    return cases


def check(folder: Path, family: Any, world: int, cases: dict[str, tuple[str, list[str]]]) -> None:
    config = make_folder(folder / family, family)
    mp.spawn(on_rank, args=(world, str(folder), family, cases), nprocs=world)
    peaks = json.loads((folder / f"peaks-{family}-{world}.json").read_text())
    far = {}
    for name, (what, overrides) in cases.items():
        plan = run_plan(load_config(config, overrides), 1, world, "cpu")
        phases = ("fisher", "traces") if what == "fisher" else ("begin", "train")
        planned = max(plan["phases"][phase]["total"] for phase in phases if phase in plan["phases"]) * 2**30
        print(f"{family}, {world} rank(s), {name}: measured {peaks[name] / 2**20:.1f} MiB, {planned / peaks[name]:.3f}")
        if abs(planned / peaks[name] - 1) > 0.1:
            far[name] = planned / peaks[name]
    assert not far


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert", "text"])
def test_one_process(tmp_path: Path, family: str) -> None:
    check(tmp_path, family, 1, ONE)


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "bert", "text"])
def test_quantised_base(tmp_path: Path, family: str, kind: str) -> None:
    more = [f"model.quantize={kind}"]
    check(tmp_path, family, 1, {name: (what, [*overrides, *more]) for name, (what, overrides) in ONE.items()})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_two_ranks(tmp_path: Path, family: str) -> None:
    check(tmp_path, family, 2, TWO)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.usefixtures("ranks_of_deepspeed")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_zero(tmp_path: Path, family: str) -> None:
    check(tmp_path, family, 2, zero_cases(tmp_path))
