"""Adapter files: the same model again, or an error that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from irdscale import Mask, load_adapter, merge, save_adapter, sparsify, unload
from irdscale.adapters.format import _contents_hash
from irdscale.distributed.ranks import end_rank
from irdscale.errors import InputError, RunError
from irdscale.sparse import entries_of, sparse_state, trained_numbers
from tests.sparse.oracle import random_mask
from tests.spawned import run_ranks
from tests.tiny_models import FAMILIES, collate, samples, tiny

HEAD = ("classifier.weight", "classifier.bias", "score.weight", "classifier.out_proj.weight")


def inputs() -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in collate(samples()).items() if name != "labels"}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def all_entries(model: nn.Module, dtype: torch.dtype) -> Mask:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return Mask({name: torch.arange(p.numel(), dtype=dtype) for name, p in model.named_parameters()}, shapes)


def trained(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return train(tiny(family).to(dtype))


def train(model: Any) -> Any:
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
    for file in ("adapter.json", "adapter.safetensors", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(("dtype", "expected"), [(None, 8), (torch.float32, 8), (torch.bfloat16, 6)])
def test_bytes_an_entry(dtype: torch.dtype | None, expected: int, tmp_path: Path) -> None:
    model = tiny("bert", hidden_size=96, intermediate_size=256).float()
    # Places given as int64 are stored as int32 all the same.
    sparsify(model, all_entries(model, torch.int64))
    save_adapter(model, tmp_path / "adapter", dtype=dtype)
    size = (tmp_path / "adapter/adapter.safetensors").stat().st_size
    assert expected * sparse_state(model).k < size < (expected + 0.1) * sparse_state(model).k
    total = sum(p.numel() for p in unload(model).parameters())
    assert sparse_state(load_adapter(model, tmp_path / "adapter")).k == total


def test_bfloat16_deltas_load_as_the_same_numbers_in_float32(tmp_path: Path) -> None:
    model = trained("bert", torch.float32)
    save_adapter(model, tmp_path / "adapter", dtype=torch.bfloat16)
    fresh = load_adapter(tiny("bert").float(), tmp_path / "adapter")
    for name, entries in entries_of(fresh).items():
        expected = entries_of(model)[name].values
        assert entries.values.dtype == torch.float32
        assert torch.equal(entries.values, expected.to(torch.bfloat16).float())
        assert not torch.equal(entries.values, expected)
    for name in sparse_state(fresh).dense:
        assert torch.equal(fresh.get_parameter(name), model.get_parameter(name)), "what is trained whole stays as it is"
    with pytest.raises(InputError, match=r"dtype: found torch.float16; expected torch.float32 or torch.bfloat16"):
        save_adapter(model, tmp_path / "other", dtype=torch.float16)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_bfloat16_base_with_float32_deltas(family: str, tmp_path: Path) -> None:
    model, batch = trained(family, torch.bfloat16), inputs()
    expected = model(**batch).logits
    save_adapter(model, tmp_path / "adapter")
    fresh = tiny(family).to(torch.bfloat16)
    before, plain = bits(fresh), fresh(**batch).logits
    load_adapter(fresh, tmp_path / "adapter")
    assert {entries.values.dtype for entries in entries_of(fresh).values()} == {torch.float32}
    assert torch.equal(fresh(**batch).logits, expected)
    unload(fresh)
    assert bits(fresh).keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in bits(fresh).items())
    assert torch.equal(fresh(**batch).logits, plain)
    merged = merge(load_adapter(fresh, tmp_path / "adapter"))
    assert torch.equal(merged(**batch).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "head"), [("bert", "classification"), ("gpt2", "classification"), ("gpt2", "lm"), ("llama", "lm")]
)
def test_a_merged_checkpoint_loads_in_plain_transformers(
    family: str, head: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    auto = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    tiny(family, head, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base", dtype=dtype).eval()
    before = model(**inputs()).logits
    expected = train(model)(**inputs()).logits
    assert not torch.equal(before, expected)
    merge(model).save_pretrained(tmp_path / "merged")
    assert [p.name for p in (tmp_path / "merged").glob("*.bin")] == []
    plain = auto.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    assert type(plain) is type(model)
    if head == "lm":
        assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(plain(**inputs()).logits, expected)


def test_a_mask_may_leave_parameters_without_entries(tmp_path: Path) -> None:
    model = tiny("bert")
    none = torch.zeros(0, dtype=torch.int32)
    name = "bert.pooler.dense.weight"
    mask = random_mask(model, 0.1)
    sparsify(model, Mask(mask.indices | {name: none}, mask.shapes))
    save_adapter(model, tmp_path / "adapter")
    assert name not in entries_of(load_adapter(tiny("bert"), tmp_path / "adapter"))


def test_trained_numbers_are_copies() -> None:
    model = trained("bert")
    deltas, dense = trained_numbers(model)
    assert deltas.keys() == entries_of(model).keys()
    assert list(dense) == [n for n, _ in model.named_parameters() if n in HEAD]
    for name, values in deltas.items():
        assert torch.equal(values, entries_of(model)[name].values)
        values.zero_()
    assert all(entries.values.any() for entries in entries_of(model).values())
    for name, whole in dense.items():
        assert torch.equal(whole, model.get_parameter(name))
        whole.zero_()
        assert model.get_parameter(name).any()


def save_on_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = trained("bert")
    with torch.no_grad():
        for entries in entries_of(model).values():
            entries.values.fill_(rank + 1)
    save_adapter(model, Path(folder) / "adapter")
    Path(folder, "file").write_text("")
    with pytest.raises(RunError, match="cannot write" if rank == 0 else "rank 0: cannot write"):
        save_adapter(model, Path(folder) / "file" / "adapter")
    end_rank()


def test_rank_0_writes_and_ranks_fail_together(tmp_path: Path) -> None:
    run_ranks(save_on_rank, 2, str(tmp_path))
    loaded = load_adapter(tiny("bert"), tmp_path / "adapter")
    assert all((entries.values == 1).all() for entries in entries_of(loaded).values())
    assert {p.name for p in tmp_path.iterdir()} <= {"adapter", "file", "store"}


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


def test_files_with_fitting_hashes_and_wrong_contents_are_refused(tmp_path: Path) -> None:
    """Whoever writes a file can write its hash too."""
    save_adapter(trained("bert"), tmp_path / "adapter")
    good = load_file(tmp_path / "adapter/adapter.safetensors")
    meta = json.loads((tmp_path / "adapter/adapter.json").read_text())
    name = "bert.pooler.dense.weight"
    index, values = good[f"index.{name}"], good[f"values.{name}"]
    outside = index.clone()
    outside[-1] = 144
    for changes, message in (
        ({f"values.{name}": None}, f"damaged adapter: {name}: found values none; expected {len(index)} numbers"),
        ({f"values.{name}": values[1:].clone()}, f"damaged adapter: {name}: found values torch.float64"),
        ({f"values.{name}": index.clone()}, f"damaged adapter: {name}: found values torch.int32"),
        ({"dense.classifier.bias": None}, "damaged adapter: its densely trained parameters are not those"),
        (
            {f"index.{name}": outside},
            f"damaged adapter: mask: {name}: found invalid indices; expected sorted, distinct indices from 0 to 143",
        ),
        (
            {"index.classifier.bias": torch.tensor([0]), "values.classifier.bias": torch.ones(1)},
            "damaged adapter: classifier.bias is trained both densely and by masked entries",
        ),
    ):
        tensors = {key: tensor for key, tensor in (good | changes).items() if tensor is not None}
        shapes = meta["shapes"] | {"classifier.bias": [3]}
        indices = {key.removeprefix("index."): t for key, t in tensors.items() if key.startswith("index.")}
        hashes = {"contents_hash": _contents_hash(tensors), "mask_hash": Mask(indices, {}).hash}
        save_file(tensors, tmp_path / "adapter/adapter.safetensors")
        (tmp_path / "adapter/adapter.json").write_text(json.dumps(meta | hashes | {"shapes": shapes}))
        model = tiny("bert")
        before = bits(model)
        with pytest.raises(InputError, match=message):
            load_adapter(model, tmp_path / "adapter")
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert bits(model).keys() == before.keys()


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
