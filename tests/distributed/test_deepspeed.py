"""Training on ranks, with DDP and DeepSpeed ZeRO 0-3, against dense masked AdamW in one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.tasks import load_task
from tests.spawned import run_ranks
from tests.training_oracle import changed, load, mask_of, oracle, toy
from tests.training_ranks import Case, around_training, distinct, equal_oracle, go_on, state_of_all_stages, warm_head

FAMILIES = ("bert", "gpt2", "llama")
# Language models on texts of unequal lengths, whose tokens count alike wherever they are.
TEXTS = ("gpt2-text", "llama-text")
STAGES = (None, 0, 1, 2, 3)
SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"decay": "weight"},
    "bfloat16": {"dtype": "bfloat16"},
}

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy tasks, and what the oracle makes of them."""
    folder = tmp_path_factory.mktemp("zero")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for family in (*FAMILIES, *TEXTS):
        path = toy(folder / family, family.partition("-")[0], text=family in TEXTS)
        for name, changes in VARIANTS.items():
            if name != "plain" and family != "bert" and (name, family) != ("bfloat16", "llama"):
                continue
            config = load(path, f"model.dtype={changes.get('dtype', 'float32')}")
            config = changed(config, **{k: v for k, v in changes.items() if k != "dtype"})
            task = load_task(config)
            torch.save(oracle(config, task, mask_of(config, task), 3), folder / f"{family}-{name}.pt")
    torch.set_num_threads(threads)
    return folder


def cases(world: int) -> list[Case]:
    """Family, oracle, stage (None is DDP, or one process), changes of the training.

    On two ranks every family meets every stage, and every change its stages; not each change in each family.
    """
    if world == 1:
        one: list[Case] = [("gpt2", "plain", s, {}) for s in STAGES]
        return [
            *one,
            ("bert", "plain", 3, {}),
            ("llama", "plain", 3, {}),
            *((family, "plain", stage, {}) for family in TEXTS for stage in (None, 2, 3)),
            ("llama", "bfloat16", 3, VARIANTS["bfloat16"]),
        ]
    found: list[Case] = [("bert", "plain", str(path), {}) for path in SHIPPED]
    found += [("gpt2", "plain", stage, {}) for stage in STAGES]
    found += [("llama", "plain", stage, {}) for stage in (0, 1)]
    for stage in (None, 2, 3):
        found += [("bert", "weight", stage, VARIANTS["weight"]), ("llama", "bfloat16", stage, VARIANTS["bfloat16"])]
        often = {"gradient_accumulation": 2, "gradient_checkpointing": True}
        found += [("llama", "plain", stage, often), ("llama-text", "plain", stage, often)]
        found += [("gpt2-text", "plain", stage, {}), ("llama-text", "plain", stage, {})]
    both = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    found += [("bert", "plain", 2, {"zero": {"offload_optimizer": {"device": "cpu"}}})]
    return [*found, ("gpt2", "plain", 3, {"zero": both}), ("bert", "bfloat16", 1, VARIANTS["bfloat16"])]


@needs_deepspeed
@pytest.mark.usefixtures("ranks_of_deepspeed")
@pytest.mark.parametrize("world", [1, 2])
def test_every_way_to_train_equals_the_oracle(world: int, folder: Path) -> None:
    spawn(equal_oracle, world, folder, cases(world))


def spawn(work: Any, world: int, folder: Path, *arguments: Any) -> None:
    """Run `work` on ranks, all of which must come to its end."""
    for path in (*folder.glob("done-*"), *folder.glob("store-*")):
        path.unlink()
    run_ranks(work, world, str(folder), *arguments)
    assert [(folder / f"done-{world}-{rank}").exists() for rank in range(world)] == [True] * world


@needs_deepspeed
@pytest.mark.usefixtures("ranks_of_deepspeed")
def test_around_training(folder: Path) -> None:
    """Heads drawn alike in partitions and warmed up alike, a bad loss on one rank, shared evaluation, bytes by k."""
    for dtype in ("float64", "float32"):
        torch.save(warm_head(load(folder / "bert" / "toy.yaml", f"model.dtype={dtype}")), folder / f"warm-{dtype}.pt")
    spawn(around_training, 2, folder)


@needs_deepspeed
@pytest.mark.usefixtures("ranks_of_deepspeed")
def test_an_adapter_holds_what_every_rank_has(folder: Path) -> None:
    spawn(distinct, 2, folder)


@needs_deepspeed
@pytest.mark.usefixtures("ranks_of_deepspeed")
def test_a_stopped_training_goes_on_with_any_stage_and_ranks(folder: Path) -> None:
    """Bit for bit on the same ranks and stage; within rounding on others, from one state of 12 bytes a number."""
    spawn(state_of_all_stages, 2, folder)
    spawn(go_on, 1, folder, ["state-2-3", "state-2-ddp"])
