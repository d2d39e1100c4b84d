"""What the ranks of tests/test_zero.py do: every way to train, one after the other in one process group."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from irdscale import merge
from irdscale.config import RunConfig
from irdscale.partitioned import shape_of, whole
from irdscale.ranks import add_up
from irdscale.sparse import base_hash, sparse_state, trained_numbers
from irdscale.tasks import Task, build_model, load_task
from irdscale.training import fine_tune, sparse_model
from tests.training_oracle import changed, load, mask_of

# Nothing stays gathered and nothing is gathered ahead, so that the tests see every gathering.
STRICT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
# Small buckets, for models of some thousand parameters.
BUCKETS = {"reduce_bucket_size": 500, "allgather_bucket_size": 500}


def settings_file(folder: Path, stage: int, **zero: Any) -> str:
    """A DeepSpeed file for a stage."""
    path = folder / f"zero{stage}-{'-'.join(zero)}.json"
    more = STRICT | {"reduce_bucket_size": 500} if stage == 3 else BUCKETS
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **more, **zero}}))
    return str(path)


@contextmanager
def group(rank: int, world: int, folder: str) -> Iterator[None]:
    """A gloo group, and what a launcher says in the environment."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    store, timeout = f"file://{folder}/store-{world}", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    yield
    (Path(folder) / f"done-{world}-{rank}").touch()
    dist.barrier()
    # DeepSpeed's communication thread may abort a process that ends in the usual way.
    os._exit(0)


class Losses:
    """The mean loss of each forward pass in training."""

    def __init__(self, model: nn.Module) -> None:
        self.own: list[torch.Tensor] = []
        model.register_forward_hook(self._see)

    def _see(self, module: nn.Module, _args: Any, output: Any) -> None:
        if module.training and output.loss is not None:
            self.own.append(output.loss.detach())

    def of_steps(self, passes: int) -> torch.Tensor:
        """Mean over the ranks and the passes of each step."""
        total = torch.stack(self.own).double().view(-1, passes).mean(1)
        add_up([total])
        return total / dist.get_world_size()


def train(config: RunConfig, task: Task, share: float = 0.1, **options: Any) -> tuple[Any, torch.Tensor]:
    """A sparse model trained as the configuration says, and its losses."""
    model = sparse_model(config, task, mask_of(config, task, share), 3)
    losses = Losses(model)
    fine_tune(model, task, config, 3, **options)
    return model, losses.of_steps(config.train.gradient_accumulation)


def check(config: RunConfig, task: Task, expected: Any, what: str) -> None:
    """The oracle's losses and weights, and the bits of the base everywhere else."""
    model, losses = train(config, task)
    low = config.model.dtype == "bfloat16"
    # bfloat16 has 8 bits: a product's rounding already differs with the rows that are taken together.
    close = {"rtol": 2e-2, "atol": 2e-2} if low else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(losses, torch.tensor(expected.losses).double(), msg=lambda m: f"{what} {m}", **close)
    state = sparse_state(model)
    deltas, dense = trained_numbers(model)
    if low:
        wanted = {n: expected.weights[n].reshape(-1)[state.mask.indices[n].long()] for n in deltas}
        wanted = {n: w - state.entries[n].base.float() for n, w in wanted.items()}
        far = torch.cat([deltas[n] - w for n, w in wanted.items()]).norm() / torch.cat([*wanted.values()]).norm()
        assert far < 0.1, (what, far)
        return
    for name, values in deltas.items():
        index = state.mask.indices[name].long()
        found = state.entries[name].base.float() + values
        wanted = expected.weights[name].reshape(-1)[index].float()
        torch.testing.assert_close(found, wanted, msg=lambda m, n=name: f"{what} {n}: {m}", **close)
        assert values.dtype == torch.float32
    assert all(bool((deltas[n] != 0).any()) for n in deltas if "token_type" not in n), what
    for name, value in dense.items():
        torch.testing.assert_close(value.float(), expected.weights[name].float(), **close)
    plain = changed(config, deepspeed=None)
    fresh = sparse_model(plain, task, state.mask, 3)
    assert base_hash(model) == base_hash(fresh), what
    merge(model)
    for name, p in model.named_parameters():
        assert shape_of(p) == tuple(expected.before[name].shape), f"{what} {name}"
        with whole([p]):
            outside = expected.masks[name] == 0
            assert torch.equal(p.detach()[outside], expected.before[name][outside]), f"{what} {name}"


def equal_oracle(rank: int, world: int, folder: str, cases: list[tuple[str, str, int | None, dict[str, Any]]]) -> None:
    """Each case: a family, a name of its oracle, a stage (None without DeepSpeed), and changes of the training."""
    with group(rank, world, folder):
        for family, name, stage, changes in cases:
            config = load(Path(folder) / family / "toy.yaml", f"model.dtype={changes.get('dtype', 'float32')}")
            zero = changes.get("zero", {})
            file = None if stage is None else settings_file(Path(folder), stage, **zero)
            train_changes = {k: v for k, v in changes.items() if k not in ("dtype", "zero")}
            config = changed(config, deepspeed=file, **train_changes)
            expected = torch.load(Path(folder) / f"{family}-{name}.pt", weights_only=False)
            check(config, load_task(config), expected, f"world {world}, {family}, stage {stage}, {changes}")


def heads(rank: int, world: int, folder: str) -> None:
    """A new head is drawn alike whether the model is whole or loaded into partitions."""
    with group(rank, world, folder):
        config = load(Path(folder) / "bert" / "toy.yaml")
        task = load_task(config)
        expected, new = build_model(config, task, 7)
        zero = changed(config, deepspeed=settings_file(Path(folder), 3))
        model, found = build_model(zero, task, 7)
        assert found == new
        assert all(p.numel() == 0 for p in model.parameters())
        for name, p in model.named_parameters():
            with whole([p]):
                assert torch.equal(p, expected.get_parameter(name)), name
