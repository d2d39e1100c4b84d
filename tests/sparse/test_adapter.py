"""Adapter files: the same model again, or an error that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale import load_adapter, merge, save_adapter, sparsify, unload
from irdscale.errors import InputError
from irdscale.sparse import entries_of, sparse_state
from tests.models import FAMILIES, collate, samples, tiny
from tests.sparse.oracle import random_mask

HEAD = ("classifier.weight", "classifier.bias", "score.weight", "classifier.out_proj.weight")


def trained(family: str) -> Any:
    model = tiny(family)
    head = [n for n, _ in model.named_parameters() if n in HEAD]
    sparsify(model, random_mask(model, 0.1, leave=tuple(head)), always_train=[f"^{n}$" for n in head])
    torch.manual_seed(5)
    with torch.no_grad():
        for entries in entries_of(model).values():
            entries.values.normal_()
        for name in head:
            model.get_parameter(name).normal_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_gives_the_same_logits_on_a_fresh_base(family: str, tmp_path: Path) -> None:
    model, batch = trained(family), collate(samples())
    expected = model(**batch).logits
    save_adapter(model, tmp_path / "adapter", config={"train": {"steps": 3}})
    fresh = tiny(family)
    plain = fresh(**batch).logits
    with torch.no_grad():
        # A new head is drawn at each load of a checkpoint without one; it is no part of the base.
        for name in sparse_state(model).dense:
            fresh.get_parameter(name).zero_()
    assert load_adapter(fresh, tmp_path / "adapter") is fresh
    assert torch.equal(fresh(**batch).logits, expected)
    assert sparse_state(fresh).k == sparse_state(model).k
    assert not torch.equal(plain, expected)
    assert torch.equal(merge(fresh)(**batch).logits, expected)
    meta = json.loads((tmp_path / "adapter/adapter.json").read_text())
    assert meta["config"] == {"train": {"steps": 3}}
    assert meta["mask_hash"] == sparse_state(model).mask.hash


def test_saving_twice_replaces_and_saving_the_loaded_one_gives_the_same_bytes(tmp_path: Path) -> None:
    model = trained("bert")
    save_adapter(model, tmp_path / "a")
    fresh = load_adapter(tiny("bert"), tmp_path / "a")
    save_adapter(fresh, tmp_path / "b")
    save_adapter(fresh, tmp_path / "b")
    for file in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_size_is_eight_bytes_an_entry(tmp_path: Path) -> None:
    model = tiny("bert", hidden_size=96, intermediate_size=256).float()
    sparsify(model, random_mask(model, 1.0))
    save_adapter(model, tmp_path / "adapter")
    size = (tmp_path / "adapter/adapter.safetensors").stat().st_size
    assert 8 * sparse_state(model).k < size < 8.2 * sparse_state(model).k


def test_another_base_is_refused_and_left_alone(tmp_path: Path) -> None:
    save_adapter(trained("bert"), tmp_path / "adapter")
    other = tiny("bert", seed=1)
    before = {n: p.detach().clone() for n, p in other.named_parameters()}
    with pytest.raises(InputError, match="adapter for another base: found weights"):
        load_adapter(other, tmp_path / "adapter")
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())
    for wrong in (tiny("bert", hidden_size=8), tiny("gpt2"), tiny("bert", "regression")):
        with pytest.raises(InputError, match="adapter for another base"):
            load_adapter(wrong, tmp_path / "adapter")
        assert {n for n, _ in wrong.named_parameters() if n.endswith("_values")} == set()
    once = load_adapter(tiny("bert"), tmp_path / "adapter")
    with pytest.raises(InputError, match="sparse already"):
        load_adapter(once, tmp_path / "adapter")
    load_adapter(unload(once), tmp_path / "adapter")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(trained("bert"), folder)
    tensors, meta = folder / "adapter.safetensors", folder / "adapter.json"
    whole, text = tensors.read_bytes(), meta.read_text()
    header = 8 + int.from_bytes(whole[:8], "little")
    for data in (whole[:-3], whole[: header // 2], b"", *(_flipped(whole, at) for at in (header + 5, len(whole) - 1))):
        tensors.write_bytes(data)
        with pytest.raises(InputError, match=r"adapter.safetensors: damaged adapter"):
            load_adapter(tiny("bert"), folder)
    tensors.write_bytes(whole)
    for broken, message in (
        (text[:50], "not a adapter|not an adapter|adapter.json"),
        (json.dumps({"format": "other"}), "found no adapter; expected format"),
        (text.replace('"version": 1', '"version": 9'), "found version 9; expected 1"),
        (text.replace('"mask_hash"', '"mask"'), "damaged adapter: no valid 'mask_hash'"),
    ):
        meta.write_text(broken)
        with pytest.raises(InputError, match=message):
            load_adapter(tiny("bert"), folder)
    meta.write_text(text)
    tensors.unlink()
    with pytest.raises(InputError, match="cannot read the adapter"):
        load_adapter(tiny("bert"), folder)
    with pytest.raises(InputError, match="cannot read the adapter"):
        load_adapter(tiny("bert"), tmp_path / "nowhere")
    tensors.write_bytes(whole)
    load_adapter(tiny("bert"), folder)


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
