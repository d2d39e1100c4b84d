"""The shipped configurations of language models, planned without the hub from the models' published sizes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from irdscale.cli.command_line import app
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.plan import run_plan
from irdscale.plan.hardware import GPUS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "llm").glob("*.yaml"))
MODELS = ROOT / "tests" / "llm"
VERBS = {command.name or command.callback.__name__ for command in app.registered_commands}
# From the models' pages.
PARAMETERS = {
    "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama31_405b": 405_853_388_800,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "qwen25_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "mistral_7b": 7_248_023_552,
    "gemma3_1b": 999_885_952,
    "phi4_14b": 14_659_507_200,
}


def model_of(path: Path) -> str:
    return next(model for model in PARAMETERS if path.stem.startswith(f"{model}_"))


def planned(path: Path) -> RunConfig:
    return load_config(path, [f"model.path={MODELS / model_of(path)}"])


def needs(path: Path) -> tuple[int, int, str, int]:
    """Nodes, GPUs a node, their name and GiB a rank, as the header says."""
    found = re.search(r"^# Needs:  (?:(\d+) nodes of )?(\d+) x (\S+): (\d+) GiB a rank", path.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1] or 1), int(found[2]), found[3], int(found[4])


def test_every_family_and_size_is_there():
    families = {model_of(path).split("_")[0] for path in CONFIGS}
    assert {"llama31", "llama32", "qwen25", "qwen3", "mistral", "gemma3", "phi4"} <= families
    ranks = {model_of(path): needs(path)[0] * needs(path)[1] for path in CONFIGS}
    assert ranks["llama31_8b"] == 1
    assert ranks["llama31_70b"] == 8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_fits_the_gpus_of_its_header(path):
    nodes, gpus, gpu, gib = needs(path)
    plan = run_plan(planned(path), nodes, gpus, gpu)
    assert plan["parameters"] == PARAMETERS[model_of(path)]
    assert plan["fits"], plan["advice"]
    assert plan["memory_gib"]["total"] <= plan["room_gib"]
    assert math.ceil(plan["memory_gib"]["total"]) == gib


@pytest.mark.parametrize(("gpu", "passes"), [("rtx4090-24gb", 2), ("l4-24gb", 3), ("a10g-24gb", 3)])
def test_8b_on_a_card_of_24_gb_leaves_a_tenth_in_each_phase(gpu, passes):
    path = ROOT / "configs" / "llm" / "llama31_8b_gsm8k_24gb.yaml"
    plan = run_plan(planned(path), 1, 1, gpu)
    assert all(items["total"] <= 0.9 * plan["room_gib"] for items in plan["phases"].values())
    sums = 4 * (PARAMETERS["llama31_8b"] - 2 * 128_256 * 4096 - 65 * 4096)
    assert plan["main_memory_gib"] == pytest.approx((sums + 8 * 14336 * 4096) / 2**30, abs=0.01)
    assert f"Main memory per node: {plan['main_memory_gib']:.1f} GiB, for offloaded tensors." in plan["advice"]
    assert f"{math.ceil(plan['main_memory_gib'])} GiB of main memory" in path.read_text()
    again = load_config(path, [f"model.path={MODELS / 'llama31_8b'}", "fisher.offload=false", "fisher.passes=auto"])
    grouped = run_plan(again, 1, 1, gpu)
    assert grouped["fisher_passes"] == passes
    assert plan["fisher_passes"] == 1
    assert grouped["fits"]
    assert grouped["main_memory_gib"] == 0
    assert grouped["phases"]["fisher"]["fisher"] == pytest.approx(sums / 2**30 / passes, rel=0.02)
    assert grouped["hours"]["fisher"] > 1.4 * plan["hours"]["fisher"]
    assert any(line.startswith(f"Masks take {passes} passes over the samples") for line in grouped["advice"])
    # NF4 with double quantisation: 4 bits, and 8 for the scale of 64 entries, and 32 for that of 256 scales.
    layers = sums // 4 * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert plan["phases"]["train"]["weights"] == pytest.approx((layers + 2 * 2 * 128_256 * 4096) / 2**30, rel=1e-3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_what_needs_and_launch(path):
    text, (nodes, gpus, gpu, _) = path.read_text(), needs(path)
    assert re.search(r"^# What:   \S", text)
    assert gpu in GPUS
    launch = re.search(r"^# Launch: (.*)$", text, re.MULTILINE)
    assert launch is not None
    command = re.search(r"(\S+) configs/llm/(\S+)(.*)$", launch[1])
    assert command is not None
    assert command[1] in VERBS
    assert command[2] == path.name
    if nodes > 1:
        assert f"NODES={nodes} " in launch[1]
        assert "launch/torchrun_multinode.sh" in launch[1]
    elif gpus > 1:
        assert f"RANKS={gpus} " in launch[1]
        assert "launch/torchrun.sh" in launch[1]
    config = load_config(path)
    assert config.output == f"runs/{path.stem}"
    assert config.model.dtype == "bfloat16"
    if config.train.deepspeed is not None:
        # The launchers install DeepSpeed where they see it.
        assert Path(config.train.deepspeed) == ROOT / "configs" / "deepspeed" / Path(config.train.deepspeed).name
        assert command[3] == f" train.deepspeed=configs/deepspeed/{Path(config.train.deepspeed).name}"
