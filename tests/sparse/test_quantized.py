"""Sparse training on a quantised base: dense AdamW with masked gradients on the dequantised model."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import irdscale
from irdscale.distributed.zero3 import shape_of
from irdscale.errors import InputError
from irdscale.masks.mask import Mask
from irdscale.sparse.entries import effective_matrix
from irdscale.sparse.model import entries_of
from irdscale.utils.quantized import dequantized, is_quantized
from tests.quantized import KINDS, dense, loaded, needs_bitsandbytes, saved
from tests.sparse.oracle import MaskedAdamW, batches, dense_masks, random_mask
from tests.tiny_models import collate, samples

pytestmark = needs_bitsandbytes
RATE, DECAY, STEPS = 1e-2, 0.1, 12


def _trained(model: Any, steps: int = STEPS) -> list[float]:
    """Train a sparse model by AdamW; the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    losses = []
    for rows in batches(samples("lm"), 4, steps):
        optimizer.zero_grad()
        loss = model(**collate(rows)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _effective(model: Any, entries: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that the model computes with, by name."""
    held = dict(model.named_parameters())
    for one in entries.values():
        one.patch()
    return {
        name: effective_matrix(p, entries.get(name)) if is_quantized(p) else p.detach().clone()
        for name, p in held.items()
        if not name.endswith("_values")
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_dense_adamw_with_masked_gradients(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model, oracle = loaded(folder, kind).train(), dense(folder, kind).train()
    mask = random_mask(oracle, 0.05, leave=("lm_head.weight",))
    irdscale.sparsify(model, mask, always_train=["^lm_head"])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    base = {name: e.base.clone() for name, e in entries_of(model).items()}
    found = _trained(model)
    optimizer = MaskedAdamW(oracle, dense_masks(oracle, mask, ("lm_head.weight",)), RATE, DECAY)
    # What is trained whole decays towards zero.
    optimizer.start["lm_head.weight"].zero_()
    expected = []
    for rows in batches(samples("lm"), 4, STEPS):
        oracle.zero_grad()
        loss = oracle(**collate(rows)).loss
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    entries = entries_of(model)
    for name, weight in _effective(model, entries).items():
        torch.testing.assert_close(weight, oracle.get_parameter(name).detach(), rtol=1e-4, atol=2e-6)
        if name in entries and is_quantized(entries[name].parameter):
            held = entries[name]
            sums = (base[name] + held.values.detach()).to(weight.dtype)
            assert torch.equal(weight.view(-1)[held.index.long()], sums)
            outside = torch.ones(weight.numel(), dtype=torch.bool)
            outside[held.index.long()] = False
            assert torch.equal(weight.view(-1)[outside], dequantized(held.parameter).view(-1)[outside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_writes_the_dequantised_base_with_the_deltas(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path / "base")
    model, oracle = loaded(folder, kind, dtype), dense(folder, kind, dtype)
    irdscale.sparsify(model.train(), random_mask(oracle, 0.05))
    _trained(model, 3)
    batch = collate(samples("lm"))
    with torch.no_grad():
        expected, weights = model.eval()(**batch).logits, _effective(model, entries_of(model))
        assert not torch.equal(expected, oracle(**batch).logits)
    merged = irdscale.merge(model)
    assert {type(m).__name__ for m in merged.modules() if isinstance(m, nn.Linear)} == {"Linear"}
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter.detach(), weights[name]), name
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert getattr(again.config, "quantization_config", None) is None
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=0)
        assert torch.equal(again.eval()(**batch).logits, merged(**batch).logits)


def test_gpt2_merges_to_its_own_transposed_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, batch = saved(tmp_path / "base", "gpt2"), collate(samples("lm"))
    model = loaded(folder, "nf4")
    name = "transformer.h.0.mlp.c_fc.weight"
    shape = shape_of(model.get_parameter(name))
    irdscale.sparsify(model, Mask({name: torch.arange(0, 600, 7, dtype=torch.int32)}, {name: shape}))
    entries_of(model)[name].values.data.normal_()
    with torch.no_grad():
        expected = model(**batch).logits
    irdscale.merge(model).save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_unload_gives_the_base_back(kind: str, tmp_path: Path) -> None:
    folder, batch = saved(tmp_path), collate(samples("lm"))
    model, oracle = loaded(folder, kind), dense(folder, kind)
    irdscale.sparsify(model, random_mask(oracle, 0.05))
    _trained(model, 2)
    irdscale.unload(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, oracle(**batch).logits)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in oracle.named_parameters()}


def test_a_copy_of_a_sparse_model_is_its_own(tmp_path: Path) -> None:
    folder, batch = saved(tmp_path), collate(samples("lm"))
    model = irdscale.sparsify(loaded(folder, "nf4"), random_mask(dense(folder, "nf4"), 0.05))
    other = copy.deepcopy(model)
    for entries in entries_of(other).values():
        entries.values.data.add_(1)
    with torch.no_grad():
        before = model(**batch).logits
        assert not torch.equal(other(**batch).logits, before)
        assert torch.equal(model(**batch).logits, before)


class _Live(TorchDispatchMode):
    """The most bytes of float tensors that were alive at once among those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self._sizes.pop, key, None)
        self.most = max(self.most, sum(self._sizes.values()))
        return made


def test_no_second_dequantised_copy_is_ever_held(tmp_path: Path) -> None:
    folder = saved(tmp_path, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_key_value_heads=2)
    reference = dense(folder, "nf4")
    mask = random_mask(reference, 0.01)
    layers = sum(p.numel() * 4 for name, p in reference.named_parameters() if "proj" in name)
    largest = max(p.numel() * 4 for name, p in reference.named_parameters() if "proj" in name)
    model = irdscale.sparsify(loaded(folder, "nf4").train(), mask)
    del reference
    batch = collate(samples("lm", count=1, longest=4))
    model(**batch).loss.backward()
    model.zero_grad()
    gc.collect()
    with _Live() as live:
        model(**batch).loss.backward()
    assert largest <= live.most < layers / 3


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model, mask = loaded(folder, "nf4"), random_mask(dense(folder, "nf4"), 0.05)
    with pytest.raises(
        InputError, match=r"^train\.always_train: found the quantised weight .*q_proj.*expected"
    ) as found:
        irdscale.sparsify(model, Mask({}, {}), always_train=["q_proj"])
    assert "\n" not in str(found.value)
    irdscale.sparsify(model, mask)
    with pytest.raises(InputError, match=r"state_dict of a quantised base: .*save_adapter"):
        model.state_dict()
    with pytest.raises(InputError, match=r"load_state_dict of a quantised base: .*load_adapter"):
        model.load_state_dict({}, strict=False)
    with pytest.raises(InputError, match="dequantize: found trained entries in the quantised weight"):
        irdscale.merge(model, dequantize=False)
