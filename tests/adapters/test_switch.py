"""Adapters that take turns on one base: each as if it were alone, and the base read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from irdscale import load_adapter, merge, save_adapter, sparsify, switch_adapter, unload
from irdscale.adapters import base
from irdscale.errors import InputError
from irdscale.sparse import entries_of, sparse_state
from tests.sparse.oracle import random_mask
from tests.tiny_models import FAMILIES, collate, samples, tiny

HEAD = r"^(classifier|score)\."
TYPES = (torch.float64, torch.bfloat16)


def logits(model: nn.Module) -> Tensor:
    batch = collate(samples())
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = bits(model)
    return now.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in now.items())


def save_trained(folder: Path, seed: int, model: Any, head: bool) -> Tensor:
    """Write an adapter with a mask and numbers of its own; the logits that it gives."""
    whole = [n for n, _ in model.named_parameters() if n.startswith(("classifier.", "score."))]
    sparsify(model, random_mask(model, 0.1, seed, tuple(whole)), always_train=[HEAD] if head else [])
    torch.manual_seed(seed)
    with torch.no_grad():
        for entries in entries_of(model).values():
            entries.values.normal_()
        for name in whole if head else ():
            model.get_parameter(name).normal_()
    save_adapter(model, folder)
    return logits(model)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each time that the base is read for a switch or a load."""
    counted: list[int] = []
    read = base.base_hash

    def counting(*arguments: Any) -> str:
        counted.append(1)
        return read(*arguments)

    monkeypatch.setattr(base, "base_hash", counting)
    return counted


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path, hashed: list[int]) -> None:
    first = save_trained(tmp_path / "a", 1, tiny(family).to(dtype), head=True)
    second = save_trained(tmp_path / "b", 2, tiny(family).to(dtype), head=True)
    model = tiny(family).to(dtype)
    before, plain = bits(model), logits(model)
    load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model), first)
    assert switch_adapter(model, tmp_path / "b") is model
    assert torch.equal(logits(model), second)
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    # Of a model of lower precision, float32 numbers are trained in the place of whole parameters too.
    whole = set(sparse_state(model).dense) - set(sparse_state(model).masters)
    assert trained == {n for n in bits(model) if n.endswith("_values")} | whole
    switch_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model), first)
    assert len(hashed) == 1, "the base is read when the first adapter is loaded"
    unload(model)
    assert same(model, before)
    assert torch.equal(logits(model), plain)
    assert all(p.requires_grad for p in model.parameters())
    merged = merge(switch_adapter(load_adapter(model, tmp_path / "a"), tmp_path / "b"))
    assert torch.equal(logits(merged), second)


def test_adapters_with_and_without_a_head_of_their_own(tmp_path: Path, hashed: list[int]) -> None:
    first = save_trained(tmp_path / "a", 1, tiny("bert"), head=True)
    second = save_trained(tmp_path / "b", 2, tiny("bert"), head=False)
    model = tiny("bert")
    before = bits(model)
    load_adapter(model, tmp_path / "a")
    for _ in range(2):
        switch_adapter(model, tmp_path / "b")
        assert torch.equal(logits(model), second)
        switch_adapter(model, tmp_path / "a")
        assert torch.equal(logits(model), first)
    assert len(hashed) == 2, "once with the head and once without"
    unload(model)
    assert same(model, before)


def test_a_model_that_was_just_trained_can_switch(tmp_path: Path) -> None:
    expected = save_trained(tmp_path / "b", 2, tiny("bert"), head=True)
    model = tiny("bert")
    save_trained(tmp_path / "a", 1, model, head=False)
    assert torch.equal(logits(switch_adapter(model, tmp_path / "b")), expected)


def test_a_failed_switch_leaves_the_adapter_in_place(tmp_path: Path) -> None:
    first = save_trained(tmp_path / "a", 1, tiny("bert"), head=True)
    second = save_trained(tmp_path / "b", 2, tiny("bert"), head=True)
    save_trained(tmp_path / "other", 2, tiny("bert", seed=9), head=True)
    save_trained(tmp_path / "headless", 2, tiny("bert", seed=9), head=False)
    save_trained(tmp_path / "narrow", 2, tiny("bert", hidden_size=8), head=True)
    save_trained(tmp_path / "labels", 2, tiny("bert", "regression"), head=True)
    save_trained(tmp_path / "gpt2", 2, tiny("gpt2"), head=True)
    data = (tmp_path / "b/adapter.safetensors").read_bytes()
    model = load_adapter(tiny("bert"), tmp_path / "a")
    objects = {n: id(p) for n, p in model.named_parameters()}
    before = bits(model)

    def refused(name: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            switch_adapter(model, tmp_path / name)
        assert {n: id(p) for n, p in model.named_parameters()} == objects
        assert same(model, before)
        assert torch.equal(logits(model), first)

    for name in ("other", "headless"):
        refused(name, "adapter for another base: found weights")
    refused("narrow", r"adapter for another base: classifier.weight: found \(3, 12\); expected \(3, 8\)")
    refused("labels", r"adapter for another base: classifier.weight: found \(3, 12\); expected \(1, 12\)")
    refused("gpt2", "adapter for another base: score.weight: found no such parameter")
    refused("nowhere", "cannot read the adapter")
    (tmp_path / "b/adapter.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused("b", "damaged adapter")
    (tmp_path / "b/adapter.safetensors").write_bytes(data)
    assert torch.equal(logits(switch_adapter(model, tmp_path / "b")), second)


def test_a_base_that_changed_since_is_noticed(tmp_path: Path) -> None:
    save_trained(tmp_path / "a", 1, tiny("bert"), head=True)
    save_trained(tmp_path / "b", 2, tiny("bert"), head=True)
    name = "bert.encoder.layer.0.output.dense.bias"

    def touch(model: nn.Module) -> None:
        with torch.no_grad():
            dict(model.named_parameters())[name][:] += 1

    def replace(model: nn.Module) -> None:
        parameter = dict(model.named_parameters())[name]
        parameter.data = parameter.data + 1

    def reload(model: nn.Module) -> None:
        model.load_state_dict({name: torch.ones(12)}, strict=False)

    for change in (touch, replace, reload):
        model = switch_adapter(load_adapter(tiny("bert"), tmp_path / "a"), tmp_path / "b")
        change(model)
        with pytest.raises(InputError, match="adapter for another base: found weights"):
            switch_adapter(model, tmp_path / "a")


def test_a_merged_base_is_another_base(tmp_path: Path) -> None:
    save_trained(tmp_path / "a", 1, tiny("bert"), head=True)
    model = merge(load_adapter(tiny("bert"), tmp_path / "a"))
    with pytest.raises(InputError, match="adapter for another base"):
        load_adapter(model, tmp_path / "a")


def test_only_a_sparse_model_switches(tmp_path: Path) -> None:
    save_trained(tmp_path / "a", 1, tiny("bert"), head=True)
    with pytest.raises(InputError, match="not a sparse model"):
        switch_adapter(tiny("bert"), tmp_path / "a")
    model = load_adapter(tiny("bert"), tmp_path / "a")
    with pytest.raises(InputError, match=r"sparse already; .* or switch_adapter"):
        load_adapter(model, tmp_path / "a")


def test_names_of_values_are_no_parameters_of_the_base(tmp_path: Path) -> None:
    """An adapter that names the trained numbers of the present one is refused before anything is changed."""
    first = save_trained(tmp_path / "a", 1, tiny("bert"), head=True)
    model = load_adapter(tiny("bert"), tmp_path / "a")
    nested = tiny("bert")
    nested.bert.pooler.dense.register_parameter("bias_values", nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    save_trained(tmp_path / "b", 2, nested, head=True)
    meta = json.loads((tmp_path / "b/adapter.json").read_text())
    assert meta["shapes"]["bert.pooler.dense.bias_values"] == [1]
    assert model.get_parameter("bert.pooler.dense.bias_values").shape == (1,)
    with pytest.raises(InputError, match="bias_values: found no such parameter"):
        switch_adapter(model, tmp_path / "b")
    assert torch.equal(logits(model), first)
