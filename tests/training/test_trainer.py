"""Training through the Trainer against the masked dense oracle, and what makes candidates comparable."""

from __future__ import annotations

import copy
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from irdscale import Mask, top_k, unload
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig, TrainConfig, training_steps
from irdscale.errors import InputError, RunError
from irdscale.fisher.pool import sample_gradients
from irdscale.models.build import build_model
from irdscale.sparse import entries_of, sparse_state, sparsify
from irdscale.tasks import Task, load_task
from irdscale.training import callback
from irdscale.training.control import Control
from irdscale.training.evaluate import evaluate_model
from irdscale.training.hf_trainer import StepLosses
from irdscale.training.trainable import sparse_model, trained_densely
from irdscale.training.trainer import fine_tune
from tests.search.toy import write_config
from tests.sparse.oracle import MaskedAdamW, dense_masks, random_mask


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Task]:
    folder = tmp_path_factory.mktemp("toy")
    config = load_config(write_config(folder), ["model.dtype=float64"])
    return config, load_task(config)


def some_mask(config: RunConfig, task: Task, share: float = 0.1) -> Mask:
    model, new = build_model(config, task, 0)
    return random_mask(model, share, leave=tuple(new))


class Recorder:
    """Token ids of each batch, and the masks that dropout drew."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.batches: list[torch.Tensor] = []
        self.dropout: list[torch.Tensor] = []
        model.register_forward_pre_hook(
            lambda _m, _a, kwargs: self.batches.append(kwargs["input_ids"].clone()), with_kwargs=True
        )
        layer = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout))
        layer.register_forward_hook(lambda _m, _a, output: self.dropout.append(output == 0))


@pytest.mark.parametrize(
    ("decay", "head_rate"), [("delta", None), ("weight", 0.1), ("weight", 0.002), ("delta", 0.002)]
)
def test_trainer_equals_the_masked_dense_oracle(
    toy: tuple[RunConfig, Task], decay: str, head_rate: float | None
) -> None:
    """Same batches, no dropout: the same weights as dense masked AdamW with clipping, warm-up, decay and two rates."""
    config, task = toy
    changes = {"weight_decay": 0.3, "decay": decay, "steps": 10, "learning_rate": 1e-2, "max_head_rate": head_rate}
    train = TrainConfig.model_validate({**config.train.model_dump(), **changes})
    model, new = build_model(config, task, 0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    dense = copy.deepcopy(model)
    mask = random_mask(model, 0.1, leave=tuple(new))
    sparsify(model, mask, always_train=[f"^{n}$" for n in new])
    recorder = Recorder(model)
    fine_tune(model, task, config.model_copy(update={"train": train}), seed=3)

    # The Trainer leaves biases and norms undecayed; towards zero the head decays too, towards its start never.
    oracle = MaskedAdamW(dense, dense_masks(dense, mask, tuple(new)), lr=0.0, weight_decay=0.3, decay=decay)
    for name in oracle.start:
        if name in new and "bias" not in name:
            oracle.start[name] = torch.zeros_like(oracle.start[name])
        if "bias" in name or "LayerNorm" in name:
            oracle.start[name] = dense.get_parameter(name)
    oracle.shares = dict.fromkeys(new, 0.2) if head_rate == 0.002 else {}
    trained = [n for n, m in oracle.masks.items() if bool(m.any())]
    rows = {tuple(r["input_ids"]): r for r in task.train}
    for step, ids_BT in enumerate(recorder.batches):
        batch = task.collate([rows[_unpadded(ids, task.tokenizer.pad_token_id)] for ids in ids_BT])
        dense.zero_grad()
        dense(**batch).loss.backward()
        gradients = torch.cat([(dense.get_parameter(n).grad * oracle.masks[n]).view(-1) for n in trained])
        clip = min(1.0, 1.0 / (float(gradients.norm()) + 1e-6))
        for p in dense.parameters():
            if p.grad is not None:
                p.grad *= clip
        oracle.lr = 1e-2 * (step / 1 if step < 1 else (10 - step) / 9)
        oracle.step()
    for name, entries in entries_of(model).items():
        expected = dense.get_parameter(name).detach().view(-1)[entries.index]
        torch.testing.assert_close(entries.base + entries.values.detach(), expected, rtol=1e-6, atol=1e-9)
    for name in new:
        torch.testing.assert_close(model.get_parameter(name), dense.get_parameter(name), rtol=1e-6, atol=1e-9)


def _unpadded(ids_T: torch.Tensor, pad: int) -> tuple[int, ...]:
    return tuple(i for i in ids_T.tolist() if i != pad)


def test_equal_seeds_give_equal_heads_data_and_dropout_whatever_the_mask(toy: tuple[RunConfig, Task]) -> None:
    config, task = toy
    seen = []
    for mask, seed in ((some_mask(config, task, 0.3), 5), (None, 5), (None, 6)):
        model = sparse_model(config, task, mask, seed)
        head = model.get_parameter("classifier.weight").detach().clone()
        recorder = Recorder(model)
        fine_tune(model, task, config, seed)
        seen.append((head, recorder))
    first, same, other = seen
    assert torch.equal(first[0], same[0])
    assert not torch.equal(first[0], other[0])
    for name in ("batches", "dropout"):
        pairs = list(zip(getattr(first[1], name), getattr(same[1], name), strict=True))
        assert len(pairs) == config.train.steps
        assert all(torch.equal(a, b) for a, b in pairs), name
        assert not all(
            a.shape == b.shape and torch.equal(a, b)
            for a, b in zip(getattr(first[1], name), getattr(other[1], name), strict=True)
        )


def test_training_again_gives_the_same_bits_and_unload_the_base(toy: tuple[RunConfig, Task]) -> None:
    config, task = toy
    mask = some_mask(config, task)
    models = [sparse_model(config, task, mask, 1) for _ in range(2)]
    base = {n: p.detach().clone() for n, p in build_model(config, task, 1)[0].named_parameters()}
    for model in models:
        fine_tune(model, task, config, 1)
    for name, entries in entries_of(models[0]).items():
        assert torch.equal(entries.values, entries_of(models[1])[name].values)
    assert sparse_state(models[0]).dense_parameters == 34
    assert all(torch.equal(p, base[n]) for n, p in unload(models[0]).named_parameters())


def test_metrics_do_not_depend_on_the_batch_size(toy: tuple[RunConfig, Task]) -> None:
    config, task = toy
    model, _ = build_model(config, task, 0)
    metrics = [evaluate_model(model, task, task.test, size) for size in (1, 7, 64)]
    assert metrics[0] == metrics[1] == metrics[2]
    with torch.no_grad():
        right = [
            int(model(**{k: v for k, v in task.collate([row]).items() if k != "labels"}).logits.argmax())
            == row["labels"]
            for row in task.test
        ]
    assert metrics[0]["accuracy"] == pytest.approx(sum(right) / len(right))


def test_a_loss_that_is_no_number_stops_with_step_and_rate(toy: tuple[RunConfig, Task]) -> None:
    config, task = toy
    model = sparse_model(config, task, None, 0)
    calls: list[int] = []

    def poison(_module: Any, _args: Any, output: Any) -> Any:
        calls.append(1)
        return output * float("nan") if len(calls) > 2 else output

    model.get_submodule("classifier").register_forward_hook(poison)
    with pytest.raises(RunError, match=r"the loss is nan at step 3, learning rate 0.00\d+"):
        fine_tune(model, task, config, 0)


class Waits(TorchDispatchMode):
    """How often the host asks a device for a number: `item`, `float`, `bool`, `nonzero` and what is made of them."""

    ASKING = ("aten._local_scalar_dense", "aten.nonzero", "aten._unique2", "aten.equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith(self.ASKING):
            # The model itself asks in each pass whether an attention mask is all ones.
            self.count += not any(f.filename.endswith("masking_utils.py") for f in traceback.extract_stack())
        return function(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device(toy: tuple[RunConfig, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are read with the first step and at the end, whatever the number of steps between, and all are seen."""
    config, task = toy
    monkeypatch.setattr(callback, "SYNC_S", 1e6)
    reads, waits = [], []
    read = StepLosses.read
    monkeypatch.setattr(StepLosses, "read", lambda self: (reads.append(1), read(self))[1])
    for steps in (4, 9):
        model = sparse_model(config, task, some_mask(config, task), 0)
        reads.clear()
        seen: list[tuple[int, float, float]] = []
        changed = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
        with Waits() as counted:
            fine_tune(model, task, changed, 0, Control(seen=lambda *found, seen=seen: seen.append(found)))
        assert len(reads) == 2
        assert [step for step, _, _ in seen] == list(range(1, steps + 1))
        assert all(loss > 0 and rate >= 0 for _, loss, rate in seen)
        waits.append(counted.count)
    assert waits[0] == waits[1]


def test_a_late_bad_loss_is_read_before_anything_is_kept(
    toy: tuple[RunConfig, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read late, it names its own step; a rung, a pause and the end come after it."""
    config, task = toy
    monkeypatch.setattr(callback, "SYNC_S", 1e6)
    asked: list[int] = []

    def at_rung(step: int) -> None:
        raise AssertionError(f"a rung after step {step}")

    def pausing() -> bool:
        asked.append(1)
        return len(asked) == 6

    long = config.model_copy(update={"train": config.train.model_copy(update={"steps": 8, "save_minutes": 1e6})})
    for control in (Control(), Control(rungs=frozenset({5}), at_rung=at_rung), Control(pausing=pausing)):
        model = sparse_model(long, task, None, 0)
        calls: list[int] = []

        def poison(_module: Any, _args: Any, output: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            return output * float("nan") if len(calls) == 3 else output

        model.get_submodule("classifier").register_forward_hook(poison)
        state = tmp_path / "state"
        with pytest.raises(RunError, match=r"the loss is nan at step 3, learning rate 0.00\d+"):
            fine_tune(model, task, long, 0, control, state)
        assert not state.exists()
        assert len(calls) > 3


def test_what_is_trained_whole(toy: tuple[RunConfig, Task], tmp_path: Path) -> None:
    config, task = toy
    model, new = build_model(config, task, 0)
    assert trained_densely(config, model, new) == new == ["classifier.weight", "classifier.bias"]
    chosen = config.model_copy(update={"train": config.train.model_copy(update={"always_train": ["pooler"]})})
    assert trained_densely(chosen, model, new) == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    scored = sample_gradients(chosen, task, model, [0, 1], trained_densely(chosen, model, new)).scored
    assert "classifier.weight" in scored
    assert "bert.pooler.dense.weight" not in scored
    none = config.model_copy(update={"train": config.train.model_copy(update={"always_train": []})})
    with pytest.raises(InputError, match="expected something to train"):
        sparse_model(none, task, None, 0)


def test_the_rate_of_the_head_is_limited_only_beside_a_mask(toy: tuple[RunConfig, Task]) -> None:
    """Without a mask the head alone is what is trained, at the learning rate."""
    config, task = toy
    heads = {}
    for limit in (None, 1e-4):
        train = config.train.model_copy(update={"steps": 3, "max_head_rate": limit})
        limited = config.model_copy(update={"train": train})
        for masked, mask in ((True, some_mask(config, task)), (False, None)):
            model = sparse_model(limited, task, mask, 0)
            fine_tune(model, task, limited, 0)
            heads[limit, masked] = model.get_parameter("classifier.weight").detach().clone()
    assert torch.equal(heads[None, False], heads[1e-4, False])
    assert not torch.equal(heads[None, True], heads[1e-4, True])


@pytest.mark.parametrize(
    ("train", "samples", "steps"),
    [({"steps": 7}, 100, 7), ({"epochs": 2.0, "batch_size": 16}, 100, 14), ({"batch_size": 10}, 95, 10)],
)
def test_length_of_training(train: dict[str, Any], samples: int, steps: int) -> None:
    assert training_steps(TrainConfig.model_validate(train), samples) == steps


def test_a_mask_that_helps(toy: tuple[RunConfig, Task]) -> None:
    """The sparse model learns what the head alone cannot."""
    config, task = toy
    model, new = build_model(config, task, 0)
    samples = sample_gradients(config, task, model, range(32), trained_densely(config, model, new))
    from irdscale import accumulate_fisher

    fisher = accumulate_fisher(
        model, samples.dataset, collate_fn=task.collate, exclude=[f"^{n}$" for n in new], batch_size=8
    )
    sparse = sparse_model(config, task, top_k(fisher, 800), 0)
    start = evaluate_model(sparse, task, task.train, 64)["accuracy"]
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 150, "learning_rate": 5e-4})})
    fine_tune(sparse, task, longer, 0)
    assert evaluate_model(sparse, task, task.train, 64)["accuracy"] > max(start, 0.6)
