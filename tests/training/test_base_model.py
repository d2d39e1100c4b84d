"""One base model for many candidates: each finds it as a load would give it, to the bit, and it is read once."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from irdscale import load_adapter, save_adapter
from irdscale.adapters import base
from irdscale.compare.run import run_compare
from irdscale.config.compare import LoraConfig
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.errors import TrainingError
from irdscale.fisher.pool import sample_gradients
from irdscale.models import build
from irdscale.models.build import build_model
from irdscale.models.new_head import NewHead
from irdscale.search import candidates, engines
from irdscale.search.ledger import read_ledger
from irdscale.search.run import run_search
from irdscale.sparse import entries_of
from irdscale.tasks import Task, load_task
from irdscale.training.base_model import KeptBase, _Held, base_model, keeping
from irdscale.training.trainable import make_sparse
from irdscale.training.trainer import fine_tune
from tests.helpers import FAMILIES, tiny_model
from tests.search.test_language import FEW, QUICKSTART
from tests.search.toy import essence, write_config
from tests.sparse.oracle import random_mask
from tests.spawned import run_ranks
from tests.training_ranks import group


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the checkpoints that are read."""
    read: list[str] = []
    real = build._load

    def loading(path: str, what: str, *arguments: Any, **options: Any) -> Any:
        if "output_loading_info" in options:
            read.append(path)
        return real(path, what, *arguments, **options)

    monkeypatch.setattr(build, "_load", loading)
    return read


def toy(folder: Path, *overrides: str, **changes: Any) -> tuple[RunConfig, Task]:
    config = load_config(write_config(folder, **changes), list(overrides))
    return config, load_task(config)


def facts(model: Any) -> dict[str, Any]:
    """All that a load fixes: the tree, every flag and plain attribute, configurations, hooks, parameters, buffers."""
    plain = (bool, int, float, str, type(None))
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_parameters")
    # Transformers' own mark of what it has initialised, which only loading reads.
    left_out = {"_is_hf_initialized"}
    return {
        "modules": [
            (
                name,
                type(module),
                sorted(vars(module).keys() - left_out),
                {k: v for k, v in vars(module).items() if isinstance(v, plain) and k not in left_out},
                [list(vars(module)[kind]) for kind in hooks],
            )
            for name, module in model.named_modules()
        ],
        "config": {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"},
        "grad": [(n, p.requires_grad, p.grad, p.dtype, p.device, p.is_leaf) for n, p in model.named_parameters()],
    }


def same(found: Any, expected: Any) -> None:
    """Equal to the bit, as two loads are."""
    plain = {key: value for key, value in vars(found).items() if key != "_irdscale_vouched"}
    vouched = vars(found).pop("_irdscale_vouched", None)
    assert plain.keys() == vars(expected).keys()
    assert facts(found) == facts(expected)
    for kind in ("named_parameters", "named_buffers"):
        for (name, a), (other, b) in zip(getattr(found, kind)(), getattr(expected, kind)(), strict=True):
            assert (name, a.dtype) == (other, b.dtype)
            assert torch.equal(a, b), name
    if vouched is not None:
        vars(found)["_irdscale_vouched"] = vouched


def mistreat(model: Any, config: RunConfig, task: Task, new: list[str], step: int) -> None:
    """What candidates and passes do, and worse."""
    if step == 0:
        sample_gradients(config, task, model, [0, 1], new).label_losses([3, 3])
    if step == 1:
        mask = random_mask(model, 0.2, 1, tuple(new))
        make_sparse(config, model, new, mask, 1)
        with torch.no_grad():
            for entries in entries_of(model).values():
                entries.values.fill_(torch.nan)
        model(**task.collate([task.train[0]]))
    if step == 2:
        make_sparse(config, model, new, None, 1, lora=LoraConfig(rank=2))
        fine_tune(model, task, config, 1)
    if step == 3:
        model.train()
        model.config.use_cache, model.config.pad_token_id = not getattr(model.config, "use_cache", False), 17
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.register_forward_hook(lambda *_: None)
        model.forward = None
        for buffer in model.buffers():
            buffer.fill_(3)
        for name in new:
            model.get_parameter(name).data = torch.full_like(model.get_parameter(name), torch.nan)
        next(model.parameters()).requires_grad_(False)
        next(model.modules()).__class__ = nn.Module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*FAMILIES, "bert-without-pooler"])
def test_a_lent_model_is_what_a_load_gives(family: str, dtype: str, tmp_path: Path, loads: list[str]) -> None:
    name = family.partition("-")[0]
    write_config(tmp_path)
    shutil.rmtree(tmp_path / "model")
    tiny_model(name, tmp_path / "model", initializer_range=0.3)  # type: ignore[arg-type]
    if family != name:
        file = tmp_path / "model" / "model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if "pooler" not in k}, file, {"format": "pt"})
    config, task = toy(tmp_path, f"model.dtype={dtype}", train__steps=2)
    kept = KeptBase()
    expected = {seed: build_model(config, task, seed) for seed in (0, 1, 5)}
    assert len({str(dict(model.named_parameters())[new[0]].sum()) for model, new in expected.values()}) == 3
    loads.clear()
    for step, seed in enumerate((0, 1, 5, 1, 0)):
        with keeping(kept), base_model(config, task, seed) as (model, new):
            assert new == expected[seed][1]
            same(model, expected[seed][0])
            mistreat(model, config, task, new, step)
    assert len(loads) == kept.loads == 1


def test_a_language_model_is_lent_as_it_was(tmp_path: Path, loads: list[str]) -> None:
    config = load_config(QUICKSTART, [*FEW, f"output={tmp_path}"])
    task, kept = load_task(config), KeptBase()
    expected, _ = build_model(config, task, 0)
    for step in (1, 2, 3, 4):
        with kept.lend(config, task, step) as (model, new):
            assert new == []
            same(model, expected)
            mistreat(model, config, task, new, step)
    assert kept.loads == 1


def test_what_is_not_as_it_was_is_loaded_anew(tmp_path: Path) -> None:
    config, task = toy(tmp_path)
    expected = build_model(config, task, 0)[0]
    kept = KeptBase()

    def lent(**changes: Any) -> int:
        other = config.model_copy(update={"model": config.model.model_copy(update=changes)})
        with kept.lend(other, task, 0) as (model, _):
            if not changes:
                same(model, expected)
            kept.last = model  # type: ignore[attr-defined]
        return kept.loads

    assert [lent(), lent()] == [1, 1]
    # Through .data, which autograd does not see; one bit of one number.
    with kept.lend(config, task, 0) as (model, _):
        model.bert.embeddings.word_embeddings.weight.data.view(torch.int32)[3, 5] ^= 1
    assert [lent(), lent()] == [2, 2]
    with kept.lend(config, task, 0) as (model, _):
        model.bert.pooler.dense.bias = nn.Parameter(torch.zeros(16))
    assert [lent(), lent()] == [3, 3]
    with pytest.raises(KeyboardInterrupt), kept.lend(config, task, 0):
        raise KeyboardInterrupt
    assert [lent(), lent()] == [4, 4]
    # What fails in an ordinary way is restored.

    def fails() -> None:
        with kept.lend(config, task, 0) as (model, new):
            make_sparse(config, model, new, random_mask(model, 0.2, 1, tuple(new)), 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [lent(), lent()] == [4, 4]
    assert [lent(dtype="bfloat16"), lent(), lent()] == [5, 6, 6]
    # One inside the other is its own.
    with kept.lend(config, task, 0) as (outer, _), kept.lend(config, task, 1) as (inner, _):
        assert outer is not inner
    # A fresh one, though a place is there, for whoever asks for it himself.
    with keeping(kept):
        assert build_model(config, task, 0)[0] is not kept.last  # type: ignore[attr-defined]
    with base_model(config, task, 0) as (first, _), base_model(config, task, 0) as (second, _):
        assert first is not second


def test_a_head_that_is_drawn_otherwise_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by a transformers that draws another number first."""
    config, task = toy(tmp_path)
    real = NewHead.drawn

    def drawn(self: NewHead, seed: int) -> dict[str, torch.Tensor]:
        return real(self, seed + 1)

    monkeypatch.setattr(NewHead, "drawn", drawn)
    kept = KeptBase()
    for seed, expected in ((0, 1), (0, 1), (1, 2), (1, 2), (0, 3)):
        with kept.lend(config, task, seed) as (model, _):
            same(model, build_model(config, task, seed)[0])
        assert kept.loads == expected


def test_the_base_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, task = toy(tmp_path, train__steps=2)
    hashed: list[int] = []
    real = base.base_hash
    monkeypatch.setattr(base, "base_hash", lambda *given: hashed.append(1) or real(*given))
    kept, found = KeptBase(), set()
    for seed in (0, 1, 2):
        with kept.lend(config, task, seed) as (model, new):
            make_sparse(config, model, new, random_mask(model, 0.2, seed, tuple(new)), seed)
            fine_tune(model, task, config, seed)
            save_adapter(model, tmp_path / str(seed))
        found.add(json.loads((tmp_path / str(seed) / "adapter.json").read_text())["base_hash"])
        with kept.lend(config, task, 7) as (model, _):
            load_adapter(model, tmp_path / str(seed))
    assert len(hashed) == len(found) == 1
    # It is the hash of the base, which a model of its own is compared with.
    load_adapter(build_model(config, task, 9)[0], tmp_path / "1")
    assert len(hashed) == 2
    # One that is trained whole and has no head left out is hashed for itself.
    whole = config.model_copy(update={"train": config.train.model_copy(update={"always_train": ["pooler"]})})
    for seed in (0, 1):
        with kept.lend(whole, task, seed) as (model, new):
            make_sparse(whole, model, new, None, seed)
            save_adapter(model, tmp_path / "pooler")
        load_adapter(build_model(whole, task, seed)[0], tmp_path / "pooler")


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compares the base's bits each time that it comes back; a number for each."""
    backs: list[int] = []
    first: dict[str, torch.Tensor] = {}
    real = _Held.restore

    def restore(self: _Held) -> bool:
        assert real(self)
        now = {n: p.detach().clone() for n, p in self.model.named_parameters() if n not in self.new}
        first.update({} if first else now)
        assert now.keys() == first.keys()
        assert all(torch.equal(p, first[n]) for n, p in now.items())
        backs.append(1)
        return True

    with monkeypatch.context() as patch:
        patch.setattr(_Held, "restore", restore)
        yield backs


def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has the third candidate end with NaN everywhere, and the fourth with an error in its midst."""
    count = 0

    def tune(model: Any, task: Task, config: RunConfig, seed: int, *more: Any) -> None:
        nonlocal count
        count += 1
        fine_tune(model, task, config, seed, *more)
        if count == 3:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(torch.nan)
            model(**task.collate([task.train[0]]))
            raise TrainingError("the loss is nan")
        if count == 4:
            model.train()
            raise ZeroDivisionError

    def again() -> None:
        nonlocal count
        count = 0

    monkeypatch.setattr(candidates, "fine_tune", tune)
    return again


def written(output: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in read_ledger(output / "ledger.jsonl")]
    files = {str(f.relative_to(output)): f.read_bytes() for f in output.rglob("*.safetensors")}
    files |= {name: (output / name).read_bytes() for name in ("fisher/traces.json",) if (output / name).exists()}
    adapters = {str(f): f.read_text().replace(str(output), "") for f in output.rglob("adapter.json")}
    return records, files | {str(Path(k).relative_to(output)): v.encode() for k, v in adapters.items()}


@pytest.mark.parametrize("kind", ["classification", "warm", "language"])
def test_a_search_is_the_same_to_the_bit(
    kind: str, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "language":
        path, more = QUICKSTART, FEW
    else:
        path, more = write_config(tmp_path, train__steps=4, search__max_rounds=1), []
        more = ["fisher.head_warmup=2", "model.dtype=bfloat16"] if kind == "warm" else more
    again, progress_listener = failing(monkeypatch), []
    for way in ("kept", "fresh"):
        again()
        loads.clear()
        config = load_config(path, [*more, f"output={tmp_path / way}"])
        if way == "kept":
            with watched(monkeypatch) as backs:
                progress_listener.append(essence(run_search(config, progress=False)))
            assert loads == [config.model.path]
        else:
            monkeypatch.setattr(engines, "keeping", lambda kept: nullcontext())
            progress_listener.append(essence(run_search(config, progress=False)))
            assert len(loads) == len(backs) > 8
    assert progress_listener[0] == progress_listener[1]
    kept, fresh = (written(tmp_path / way) for way in ("kept", "fresh"))
    assert kept == fresh
    failed = [record["error"] for record in kept[0] if record["status"] == "failed"]
    assert [re.split(r"\W", error)[0] for error in failed] == ["TrainingError", "ZeroDivisionError"]
    assert any(name.startswith("adapter/") for name in kept[1])


def test_a_comparison_is_the_same_to_the_bit(tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    methods = ["ird", "fish", "random_mask", "lora", "dora", "shira", "sparse_lora", "bitfit", "full", "linear_probe"]
    compare = {"methods": methods, "learning_rates": [0.003], "seeds": [0, 1], "equal_budget": False}
    path = write_config(tmp_path, compare=compare, search__max_rounds=1, train__steps=2)
    progress_listener = []
    for way in ("kept", "fresh"):
        loads.clear()
        config = load_config(path, [f"output={tmp_path / way}"])
        if way == "kept":
            with watched(monkeypatch):
                found = run_compare(config, progress=False)
            assert len(loads) == 1
        else:
            monkeypatch.setattr(engines, "keeping", lambda kept: nullcontext())
            found = run_compare(config, progress=False)
            assert len(loads) > 20
        progress_listener.append({k: v for k, v in found.items() if k not in ("seconds", "costs", "config")})
    assert progress_listener[0] == progress_listener[1]
    assert written(tmp_path / "kept")[0] == written(tmp_path / "fresh")[0]


def test_a_search_leaves_no_model_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_config(tmp_path, train__steps=2, search__max_rounds=1))
    held: list[weakref.ref[nn.Module]] = []
    real = _Held.__init__

    def remember(self: _Held, key: Any, model: nn.Module, *more: Any) -> None:
        held.append(weakref.ref(model))
        real(self, key, model, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(_Held, "__init__", remember)
    run_search(config, progress=False)
    gc.collect()
    assert [ref() for ref in held] == [None]


def _on_rank(rank: int, world: int, folder: str) -> None:
    with group(rank, world, folder):
        config = load_config(Path(folder) / "toy.yaml", ["train.steps=3"])
        task, kept = load_task(config), KeptBase()
        for turn, seed in enumerate((0, 1, 0)):
            numbers = []
            for place in (kept, KeptBase()):
                with place.lend(config, task, seed) as (model, new):
                    make_sparse(config, model, new, random_mask(model, 0.2, turn, tuple(new)), seed)
                    fine_tune(model, task, config, seed)
                    numbers.append({n: p.detach().clone() for n, p in model.named_parameters()})
            assert all(torch.equal(value, numbers[1][name]) for name, value in numbers[0].items()), turn
        assert kept.loads == 1


@pytest.mark.usefixtures("ranks_of_deepspeed")
def test_ranks_that_train_together_keep_theirs(tmp_path: Path) -> None:
    write_config(tmp_path)
    run_ranks(_on_rank, 2, str(tmp_path))
    assert len(list(tmp_path.glob("done-2-*"))) == 2
