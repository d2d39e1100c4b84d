"""What the ranks of tests/distributed/test_deepspeed.py do: every way to train, in one process group."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from irdscale import merge
from irdscale.config.schema import RunConfig
from irdscale.distributed.deepspeed import zero_stage
from irdscale.distributed.ranks import all_reduce_sum, end_rank
from irdscale.distributed.zero3 import gathered_parameters, numel_of, shape_of
from irdscale.errors import TrainingError
from irdscale.fisher.pool import sample_gradients
from irdscale.models.build import build_model
from irdscale.sparse import base_hash, sparse_state, trained_numbers
from irdscale.tasks import Task, load_task
from irdscale.training import evaluations
from irdscale.training.base_model import KeptBase
from irdscale.training.control import Control
from irdscale.training.evaluate import evaluate_model
from irdscale.training.head_warmup import model_to_score
from irdscale.training.recorder import Records
from irdscale.training.trainable import make_sparse, sparse_model
from irdscale.training.trainer import fine_tune
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
    # Each rank writes it, while another may read it.
    own = path.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps({"zero_optimization": {"stage": stage, **more, **zero}}))
    own.replace(path)
    return str(path)


@contextmanager
def group(rank: int, world: int, folder: str) -> Iterator[None]:
    """A gloo group, and what a launcher says in the environment."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    # Unset, accelerate would take two threads a rank.
    os.environ["OMP_NUM_THREADS"] = "1"
    store, timeout = f"file://{folder}/store-{world}", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    yield
    (Path(folder) / f"done-{world}-{rank}").touch()
    end_rank()


class Losses:
    """The mean loss of each forward pass in training."""

    def __init__(self, model: nn.Module) -> None:
        self.own: list[torch.Tensor] = []
        model.register_forward_hook(self._see)

    def _see(self, module: nn.Module, _args: Any, output: Any) -> None:
        if module.training and output.loss is not None:
            # A copy, for the Trainer scales it in place.
            self.own.append(output.loss.detach().clone())

    def of_steps(self, passes: int, texts: bool) -> torch.Tensor:
        """Mean over the ranks and the passes of each step; of texts the sum, for each has its share of all tokens."""
        total = torch.stack(self.own).double().view(-1, passes).sum(1)
        all_reduce_sum([total])
        return total if texts else total / (passes * dist.get_world_size())


def train(config: RunConfig, task: Task, share: float = 0.1, **options: Any) -> tuple[Any, torch.Tensor]:
    """A sparse model trained as the configuration says, and its losses."""
    model = sparse_model(config, task, mask_of(config, task, share), 3)
    losses = Losses(model)
    fine_tune(model, task, config, 3, **options)
    return model, losses.of_steps(config.train.gradient_accumulation, task.is_language)


def check(config: RunConfig, task: Task, expected: Any, what: str) -> None:
    """The oracle's losses and weights, and the bits of the base everywhere else."""
    with tempfile.TemporaryDirectory() as folder:
        records = Records(Path(folder) / "metrics.jsonl", "case", Path(folder) / "tensorboard")
        model, losses = train(config, task, records=records)
        # Only rank 0 writes.
        assert records.file.exists() == (dist.get_rank() == 0)
        lines = [json.loads(line) for line in records.file.read_text().splitlines()] if dist.get_rank() == 0 else None
    low = config.model.dtype == "bfloat16"
    # bfloat16 has 8 bits: a product's rounding already differs with the rows that are taken together.
    close = {"rtol": 2e-2, "atol": 2e-2} if low else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(losses, torch.tensor(expected.losses).double(), msg=lambda m: f"{what} {m}", **close)
    if lines is not None:
        check_lines(lines, expected, close, what, normed=zero_stage(config) != 0)
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
        with gathered_parameters([p]):
            outside = expected.masks[name] == 0
            assert torch.equal(p.detach()[outside], expected.before[name][outside]), f"{what} {name}"


def check_lines(lines: list[dict[str, Any]], expected: Any, close: dict[str, float], what: str, normed: bool) -> None:
    """The oracle's losses and gradient norms in metrics.jsonl, one line a step; DeepSpeed knows no norm at stage 0."""
    assert [line["step"] for line in lines] == list(range(1, len(expected.losses) + 1)), what
    for name, wanted in (("loss", expected.losses), ("grad_norm", expected.norms)):
        found = [line[name] for line in lines]
        if name == "grad_norm" and not normed:
            assert found == [None] * len(found), what
            continue
        # Gradients of the rounded weights of bfloat16 differ more than losses.
        room = close if name == "loss" else {"rtol": 10 * close["rtol"], "atol": 10 * close["atol"]}
        text = f"{what}, {name} of metrics.jsonl"
        found_N, wanted_N = torch.tensor(found).double(), torch.tensor(wanted).double()
        torch.testing.assert_close(found_N, wanted_N, msg=lambda m, t=text: f"{t}: {m}", **room)


Case = tuple[str, str, int | str | None, dict[str, Any]]


def equal_oracle(rank: int, world: int, folder: str, cases: list[Case]) -> None:
    """Each case: a family, a name of its oracle, a stage or file (None without DeepSpeed), changes of the training."""
    with group(rank, world, folder):
        tasks: dict[str, Task] = {}
        for family, name, stage, changes in cases:
            config = load(Path(folder) / family / "toy.yaml", f"model.dtype={changes.get('dtype', 'float32')}")
            zero = changes.get("zero", {})
            file = settings_file(Path(folder), stage, **zero) if isinstance(stage, int) else stage
            train_changes = {k: v for k, v in changes.items() if k not in ("dtype", "zero")}
            config = changed(config, deepspeed=file, **train_changes)
            expected = torch.load(Path(folder) / f"{family}-{name}.pt", weights_only=False)
            if family not in tasks:
                tasks[family] = load_task(config)
            check(config, tasks[family], expected, f"world {world}, {family}, stage {stage}, {changes}")


def around_training(rank: int, world: int, folder: str) -> None:
    """What comes before, goes wrong in, and is sent during a training."""
    with group(rank, world, folder):
        config = load(Path(folder) / "bert" / "toy.yaml")
        task = load_task(config)
        zero = changed(config, deepspeed=settings_file(Path(folder), 3))
        heads(config, zero, task)
        bad_loss_on_one_rank(config, task, rank)
        evaluated(config, zero, task)
        for stage in (2, 1, None, 3):
            lent(
                config if stage is None else changed(config, deepspeed=settings_file(Path(folder), stage)), task, stage
            )
        for stage in (None, 1, 2, 3):
            way = config if stage is None else changed(config, deepspeed=settings_file(Path(folder), stage))
            kept(way, task, stage, Path(folder) / f"kept-{stage}")
        # Before what counts DDP's bytes: a training with DeepSpeed leaves nothing behind that changes the next one.
        warmed(Path(folder))
        for stage in (None, 1, 2, 3):
            lean(
                config if stage is None else changed(config, deepspeed=settings_file(Path(folder), stage)), task, stage
            )


def heads(config: RunConfig, zero: RunConfig, task: Task) -> None:
    """A new head is drawn alike whether the model is whole or loaded into partitions."""
    expected, new = build_model(config, task, 7)
    model, found = build_model(zero, task, 7)
    assert found == new
    assert all(p.numel() == 0 for p in model.parameters())
    for name, p in model.named_parameters():
        with gathered_parameters([p]):
            assert torch.equal(p, expected.get_parameter(name)), name


def bad_loss_on_one_rank(config: RunConfig, task: Task, rank: int) -> None:
    """All ranks stop, with the step, the learning rate and the rank."""
    model = sparse_model(config, task, None, 0)
    calls: list[int] = []

    def poison(_module: Any, _args: Any, output: Any) -> Any:
        calls.append(1)
        return output * float("nan") if rank == 1 and len(calls) > 2 else output

    model.get_submodule("classifier").register_forward_hook(poison)
    with pytest.raises(TrainingError, match=r"^rank 1: the loss is nan at step 3, learning rate 0\.0"):
        fine_tune(model, task, config, 0)


def evaluated(config: RunConfig, zero: RunConfig, task: Task) -> None:
    """Metrics of a whole and a partitioned model, shared among ranks of which one may have nothing left."""
    expected = None
    for way in (config, zero):
        model = build_model(way, task, 0)[0]
        for size in (3, 64):
            found = evaluate_model(model, task, task.test, size)
            expected = expected or found
            assert found == expected


def lent(config: RunConfig, task: Task, stage: int | None) -> None:
    """Trainings on one base model come to the numbers of those on their own; in ZeRO-3 partitions each has its own."""
    config, kept = changed(config, steps=3), KeptBase()
    for turn, seed in enumerate((0, 1, 0)):
        numbers = []
        for place in (kept, KeptBase()):
            with place.lend(config, task, seed) as (model, new):
                make_sparse(config, model, new, mask_of(config, task, 0.1 + 0.1 * turn), seed)
                fine_tune(model, task, config, seed)
                numbers.append(trained_numbers(model))
        same(numbers[0], numbers[1], 0.0, f"lent model, stage {stage}, turn {turn}")
    assert kept.loads == (3 if stage == 3 else 1), stage


def kept(config: RunConfig, task: Task, stage: int | None, state: Path) -> None:
    """The numbers of the best evaluation are kept, also if it was before a stop; the real metric moves nothing."""
    config = changed(config, steps=6, eval_steps=2, keep="best", save_minutes=0.0)
    plain, seen, steps = changed(config, keep="last", eval_steps=None), dict[int, Any](), list[int]()
    expected = trained_numbers(train(plain, task)[0])
    real = evaluate_model

    def peak(model: nn.Module, *rest: Any) -> dict[str, float]:
        place = 2 * (1 + len(seen))
        assert task.metric in real(model, *rest)
        seen[place] = trained_numbers(model)
        metric = {2: 0.5, 4: 0.9, 6: 0.1}[place]
        return {task.metric: -metric if task.lower_is_better else metric}

    evaluations.evaluate_model = peak
    try:
        model = train(config, task, control=Control(kept=steps.append))[0]
        same(trained_numbers(model), seen[4], 0.0, f"the best of stage {stage}")
        same(seen[6], expected, 0.0, f"evaluated in between, stage {stage}")
        seen.clear()
        try:
            train(config, task, control=Control(stopper(4)), state=state)
            raise AssertionError("not stopped")
        except Stopped:
            dist.barrier()
        model = train(config, task, control=Control(kept=steps.append), state=state)[0]
        same(trained_numbers(model), seen[4], 0.0, f"the best before the stop, stage {stage}")
        assert steps == [4, 4], (stage, steps)
    finally:
        evaluations.evaluate_model = real


def warm_head(config: RunConfig) -> dict[str, torch.Tensor]:
    """The head that Fisher passes see after some steps, and the samples' traces by it."""
    fisher = config.fisher.model_copy(update={"head_warmup": 10})
    config, task = config.model_copy(update={"fisher": fisher}), load_task(config)
    with model_to_score(config, task, progress=False) as (model, new):
        samples = sample_gradients(config, task, model, range(13), new)
        traces = torch.zeros(13, dtype=torch.float64)
        samples.add_traces(range(13), traces)
        found = {"traces": traces}
        for name in new:
            with gathered_parameters([model.get_parameter(name)]):
                found[name] = model.get_parameter(name).detach().clone()
    return found


def warmed(folder: Path) -> None:
    """Ranks that warm a head up together come to the one that a process alone comes to by the same batches."""
    for dtype, stages, tolerance in (("float64", (None,), 1e-10), ("float32", (2, 3), 1e-5)):
        config = load(folder / "bert" / "toy.yaml", f"model.dtype={dtype}")
        expected = torch.load(folder / f"warm-{dtype}.pt", weights_only=True)
        cold = build_model(config, load_task(config), 0)[0].get_parameter("classifier.weight")
        assert (expected["classifier.weight"] - cold).abs().max() > 1e-2
        for stage in stages:
            file = None if stage is None else settings_file(folder, stage)
            found = warm_head(changed(config, deepspeed=file))
            close(found, expected, tolerance, f"warm head, stage {stage}")


def lean(config: RunConfig, task: Task, stage: int | None) -> None:
    """Bytes reduced a step and bytes of optimizer state follow the trained numbers, not the parameters."""
    steps = 3
    for share in (0.01, 0.3):
        model = sparse_model(changed(config, steps=steps), task, mask_of(config, task, share), 3)
        trained = sum(numel_of(p) for p in model.parameters() if p.requires_grad)
        frozen = sum(numel_of(p) for p in model.parameters() if not p.requires_grad)
        states: list[int] = []
        create = torch.optim.AdamW.step

        def spy(self: Any, *args: Any, states: list[int] = states, create: Any = create, **kwargs: Any) -> Any:
            result = create(self, *args, **kwargs)
            states.append(sum(t.numel() * t.element_size() for s in self.state.values() for t in s.values() if t.dim()))
            return result

        torch.optim.AdamW.step = spy  # type: ignore[method-assign]
        try:
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
                fine_tune(model, task, changed(config, steps=steps), 3)
        finally:
            torch.optim.AdamW.step = create  # type: ignore[method-assign]
        world = dist.get_world_size()
        # Padding: a number or two for each parameter and partition.
        room = 64 * len(list(model.parameters()))
        expected = 8 * trained / (1 if stage is None else world)
        assert expected <= max(states) <= expected + room, (stage, share, max(states), expected)
        reduced = sum(_bytes(e) for e in profiled.events() if e.name in REDUCTIONS) / steps
        # DDP sends each gradient once; the flags and norms of a step are some numbers more.
        assert 4 * trained <= reduced <= 2 * 4 * trained + room, (stage, share, reduced, trained)
        assert share > 0.1 or reduced < 4 * frozen / 10


REDUCTIONS = {"gloo:all_reduce", "gloo:reduce", "gloo:reduce_scatter", "gloo:_reduce_scatter_base"}


def _bytes(event: Any) -> int:
    return 4 * sum(math.prod(shape) for shape in event.input_shapes if shape)


class Stopped(BaseException):
    """Ends a training in the middle, as a kill would."""


def stopper(after: int) -> Any:
    """A progress callback that ends the training after so many steps."""
    left = after

    def advance(steps: int = 1, **_: Any) -> None:
        nonlocal left
        left -= steps
        if left < 0:
            raise Stopped

    return advance


def state_of_all_stages(rank: int, world: int, folder: str) -> None:
    """Stop each way to train in the middle; go on with it, and with the others, from one and the same state."""
    with group(rank, world, folder):
        config = changed(load(Path(folder) / "bert" / "toy.yaml"), save_minutes=0.0)
        task = load_task(config)
        ways = {str(s): changed(config, deepspeed=settings_file(Path(folder), s)) for s in (1, 3)}
        ways["offload"] = changed(config, deepspeed=settings_file(Path(folder), 2, offload_optimizer={"device": "cpu"}))
        ways["ddp"] = config
        gathered_parameters: dict[str, Any] = {}
        for name, way in ways.items():
            gathered_parameters[name] = trained_numbers(train(way, task)[0])
        for name, way in ways.items():
            state = Path(folder) / f"state-{world}-{name}"
            try:
                train(way, task, control=Control(stopper(5)), state=state)
                raise AssertionError("not stopped")
            except Stopped:
                pass
            dist.barrier()
            for other in (name, {"1": "3", "3": "ddp", "ddp": "offload", "offload": "1"}[name]):
                model, losses = train(ways[other], task, state=copied(state))
                # Steps 1 to 5 were saved, step 6 was not.
                assert len(losses) == 12 - 5, (name, other, len(losses))
                exact = name == other
                same(trained_numbers(model), gathered_parameters[name], 0.0 if exact else 1e-5, f"{name} -> {other}")
        shapes_and_sizes(Path(folder), task, ways, world)


def copied(state: Path) -> Path:
    """A copy of a state, for a training that will write its own."""
    copy = state.parent / "copied"
    if dist.get_rank() == 0:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(state, copy)
    dist.barrier()
    return copy


def same(found: Any, expected: Any, tolerance: float, what: str) -> None:
    """Two sets of trained numbers are equal, or close."""
    for part, wanted in zip(found, expected, strict=True):
        close(part, wanted, tolerance, what)


def close(found: dict[str, Any], expected: dict[str, Any], tolerance: float, what: str) -> None:
    """Tensors of the same names are equal, or close."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance / 5, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


def shapes_and_sizes(folder: Path, task: Task, ways: dict[str, RunConfig], world: int) -> None:
    """12 bytes a trained number, whatever the stage, and the loss of each step; nothing of the base."""
    from safetensors import safe_open

    for name in ways:
        state = folder / f"state-{world}-{name}"
        assert sorted(p.name for p in state.iterdir()) == ["numbers.safetensors", "state.json"]
        with safe_open(state / "numbers.safetensors", "pt") as file:
            sizes = {key: file.get_tensor(key).numel() for key in file.keys() if not key.startswith("rng/")}  # noqa: SIM118
        model = sparse_model(ways["ddp"], task, mask_of(ways["ddp"], task), 3)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sizes.pop("losses") == json.loads((state / "state.json").read_text())["step"]
        assert sum(sizes.values()) == 3 * trained


def go_on(rank: int, world: int, folder: str, states: list[str]) -> None:
    """Take up states that another number of ranks left."""
    with group(rank, world, folder):
        config = changed(load(Path(folder) / "bert" / "toy.yaml"), save_minutes=0.0)
        task = load_task(config)
        expected = trained_numbers(train(config, task)[0])
        for name in states:
            for stage in (1, 3):
                way = changed(config, deepspeed=settings_file(Path(folder), stage))
                model, losses = train(way, task, state=copied(Path(folder) / name))
                assert len(losses) == 7
                same(trained_numbers(model), expected, 1e-5, f"{name} on {world}")


def distinct(rank: int, world: int, folder: str) -> None:
    """Every rank writes numbers of its own into its part; the adapter holds all of them."""
    from irdscale import load_adapter, save_adapter

    with group(rank, world, folder):
        config = load(Path(folder) / "llama" / "toy.yaml")
        task = load_task(config)
        zero = changed(config, deepspeed=settings_file(Path(folder), 3))
        mask = mask_of(config, task)
        model = sparse_model(zero, task, mask, 3)
        fine_tune(model, task, changed(zero, steps=1), 3)
        entries = sparse_state(model).entries
        for place, name in enumerate(sorted(entries)):
            part = entries[name].values.ds_tensor  # type: ignore[attr-defined]
            part.data.copy_(torch.arange(part.numel()) + 1000.0 * rank + 10.0 * place)
        save_adapter(model, Path(folder) / "adapter")
        dist.barrier()
        found = load_adapter(sparse_model_base(config, task), Path(folder) / "adapter")
        for place, (name, e) in enumerate(sorted(sparse_state(found).entries.items())):
            share = -(-len(e.values) // world)
            numbers = [torch.arange(share) + 1000.0 * r + 10.0 * place for r in range(world)]
            assert torch.equal(e.values.detach(), torch.cat(numbers)[: len(e.values)]), name


def sparse_model_base(config: RunConfig, task: Task) -> Any:
    """The model that `sparse_model` starts from."""
    return build_model(config, task, 3)[0]
