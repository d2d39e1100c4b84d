"""Sparse models against dense ones with masked gradients, in float64."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from irdscale import Mask, accumulate_fisher, merge, sparsify, top_k, unload
from irdscale.errors import InputError
from irdscale.sparse import base_hash, entries_of, functions, products, sparse_state
from tests.fisher.families import classifier, configs, rows_for
from tests.fisher.oracle import loss_of
from tests.sparse.oracle import MaskedAdamW, batches, dense_masks, random_mask
from tests.tiny_models import FAMILIES, collate, samples, tiny

CLOSE = {"rtol": 1e-7, "atol": 1e-10}


def loss(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    return torch.stack([loss_of(model, collate([row])) for row in rows]).mean()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_trains_like_the_oracle(
    model: Any, rows: list[dict[str, Any]], mask: Mask, always_train: tuple[str, ...] = (), objective: Any = loss
) -> None:
    """Ten steps with decay: the same losses and weights as the masked dense model; nothing else moves."""
    dense, before = copy.deepcopy(model), bits(model)
    masks = dense_masks(dense, mask, always_train)
    dense.requires_grad_(True)
    oracle = MaskedAdamW(dense, masks, lr=1e-2, weight_decay=0.1)
    sparsify(model, mask, always_train=[f"^{n}$" for n in always_train])
    entries = entries_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == mask.k + sum(before[n].numel() for n in always_train)
    whole = [p for n, p in model.named_parameters() if n in always_train]
    optimizers = [torch.optim.AdamW([e.values for e in entries.values()], lr=1e-2, weight_decay=0.1)]
    if whole:
        # The oracle decays towards the start; AdamW decays towards zero.
        optimizers.append(torch.optim.AdamW(whole, lr=1e-2, weight_decay=0.0))
        for name in always_train:
            oracle.start[name] = dense.get_parameter(name)
    for batch in batches(rows, 3, 10):
        expected = objective(dense, batch)
        dense.zero_grad()
        expected.backward()
        oracle.step()
        found = objective(model, batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        found.backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(found, expected, **CLOSE)
    for name, p in model.named_parameters():
        if not name.endswith("_values") and name not in always_train:
            assert p.grad is None, "no gradient of a weight's size"
    merge(model)
    assert sorted(n for n, _ in model.named_parameters()) == sorted(before)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, dense.get_parameter(name), **CLOSE)
        outside = masks[name] == 0
        assert torch.equal(p[outside], before[name][outside]), f"{name}: an entry outside the mask moved"
    moved = sum(int((p.detach() != before[n]).sum()) for n, p in model.named_parameters())
    assert moved > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.02, 0.4, 1.0])
def test_every_kind_of_parameter_trains_like_the_oracle(family: str, share: float) -> None:
    model = tiny(family)
    assert_trains_like_the_oracle(model, samples(), random_mask(model, share))


@pytest.mark.parametrize("taken", [(False, False), (True, True)])
@pytest.mark.parametrize("kind", ["dense", "sampled"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_every_product_trains_like_the_oracle(
    family: str, kind: str, taken: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "choose", lambda *_: (kind, taken))
    model = tiny(family)
    assert_trains_like_the_oracle(model, samples(), random_mask(model, 0.1))


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_mask_with_a_dense_head(family: str) -> None:
    model, rows = tiny(family), samples()
    head = tuple(n for n, _ in model.named_parameters() if n.startswith(("classifier", "score")))
    fisher = accumulate_fisher(model, rows, collate_fn=collate, exclude=["^classifier", "^score"])
    assert_trains_like_the_oracle(model, rows, top_k(fisher, 60), head)


@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", True), ("llama", False)])
def test_tied_embedding_and_head(family: str, tied: bool) -> None:
    model = tiny(family, "lm", tie_word_embeddings=tied)
    assert_trains_like_the_oracle(model, samples("lm"), random_mask(model, 0.1))
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared is tied


@pytest.mark.parametrize("family", ["albert", "deberta"])
def test_shared_layers_and_direct_uses(family: str) -> None:
    model = tiny(family)
    assert_trains_like_the_oracle(model, samples(), random_mask(model, 0.1))


@pytest.mark.parametrize("family", [f for f in configs() if f.lower().replace("-", "") not in FAMILIES])
def test_other_families(family: str) -> None:
    config = configs()[family]
    model = classifier(config)
    assert_trains_like_the_oracle(model, rows_for(config), random_mask(model, 0.1))


class Unusual(nn.Module):
    """A convolution, a parameter of the model itself, a weight used twice and once past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 6, padding_idx=0, scale_grad_by_freq=True)
        self.shift = nn.Parameter(torch.randn(6))
        self.mix = nn.Conv1d(6, 6, 3, padding=1)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.shift
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = self.twice(torch.tanh(self.twice(x)))
        x = (x * attention_mask.unsqueeze(2)).sum(1)
        return self.head(x) + (x @ self.twice.weight)[:, :3]


def test_whatever_the_mask_names() -> None:
    torch.manual_seed(0)
    model = Unusual().double()

    def objective(m: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
        batch = collate(rows)
        labels = batch.pop("labels")
        return nn.functional.cross_entropy(m(**batch), labels)

    assert_trains_like_the_oracle(model, samples(), random_mask(model, 0.3), objective=objective)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    rows, batch = samples(), collate(samples())
    plain, checkpointed = tiny("llama"), tiny("llama")
    mask = random_mask(plain, 0.1)
    for model in (plain, checkpointed):
        sparsify(model, mask)
        model.train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model(**batch).loss.backward()
    for name, entries in entries_of(plain).items():
        torch.testing.assert_close(entries_of(checkpointed)[name].values.grad, entries.values.grad, msg=name)
    assert len(rows) == len(batch["labels"])


def test_backward_stops_below_the_lowest_entries() -> None:
    model, rows = tiny("bert"), samples()
    fisher = accumulate_fisher(model, rows, collate_fn=collate, include=[r"layer\.1"])
    sparsify(model, top_k(fisher, 20))
    hidden = model(**collate(rows), output_hidden_states=True).hidden_states
    assert not hidden[1].requires_grad
    assert hidden[2].requires_grad


def test_the_lowest_matrix_with_entries_computes_no_input_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    names = ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    mask = Mask({n: torch.tensor([1]) for n in names}, {n: tuple(model.get_parameter(n).shape) for n in names})
    sparsify(model, mask)
    asked: list[bool] = []
    backward = functions.SparseMatmul.backward

    def watched(ctx: Any, dy: Tensor) -> Any:
        gradients = backward(ctx, dy)
        asked.append(gradients[0] is not None)
        return gradients

    monkeypatch.setattr(functions.SparseMatmul, "backward", staticmethod(watched))
    model(**collate(samples())).loss.backward()
    assert asked == [True, False]


@pytest.mark.parametrize("fails", [False, True])
def test_a_part_by_itself_is_patched_anew(fails: bool) -> None:
    """What a pass of the whole model patched as it started counts for that pass alone."""
    model, batch = tiny("bert"), collate(samples())
    layer, name = model.bert.encoder.layer[1].output.dense, "bert.encoder.layer.1.output.dense.weight"
    plain = copy.deepcopy(layer)
    sparsify(model, random_mask(model, 0.1))
    entries = entries_of(model)[name]
    if fails:
        with pytest.raises(ValueError, match="input_ids"):
            model()
    else:
        model(**batch)
    with torch.no_grad():
        entries.values += 1
        plain.weight.view(-1)[entries.index.long()] += 1
    x = torch.randn(3, plain.in_features, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(model).get_submodule(name.removesuffix(".weight"))(x), plain(x))
    assert torch.equal(layer(x), plain(x))
    with torch.no_grad():
        entries.values += 1
        plain.weight.view(-1)[entries.index.long()] += 1
    torch.testing.assert_close(layer.weight, plain.weight)
    unload(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def randomise(model: nn.Module) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for entries in entries_of(model).values():
            entries.values.normal_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_unload(family: str, dtype: torch.dtype) -> None:
    model, batch = tiny(family).to(dtype), collate(samples())
    before, logits = bits(model), model(**batch).logits
    frozen = next(n for n, _ in model.named_parameters())
    model.get_parameter(frozen).requires_grad_(False)
    types = [type(m) for m in model.modules()]
    head = [n for n in before if n in ("classifier.bias", "classifier.out_proj.bias", "score.weight")]
    sparsify(model, random_mask(model, 0.1, leave=tuple(head)), always_train=[f"^{n}$" for n in head])
    assert sparse_state(model).dense_parameters in (3, 36)
    assert torch.equal(model(**batch).logits, logits), "deltas start at 0"
    assert all(e.values.dtype == torch.float32 for e in entries_of(model).values())
    randomise(model)
    with torch.no_grad():
        for name in sparse_state(model).dense:
            model.get_parameter(name).normal_()
    changed = model(**batch).logits
    assert not torch.allclose(changed, logits)
    merged = merge(copy.deepcopy(model))
    assert torch.equal(merged(**batch).logits, changed)
    for result in (merged, unload(model)):
        assert [type(m) for m in result.modules()] == types
        assert [n for n, p in result.named_parameters() if not p.requires_grad] == [frozen]
        assert not any("_sparse" in vars(m) for m in result.modules())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert list(before) == [n for n, _ in model.named_parameters()]


def test_base_hash_does_not_see_deltas_or_the_dense_head() -> None:
    model = tiny("bert")
    sparsify(model, random_mask(model, 0.1, leave=("classifier.bias",)), always_train=["classifier.bias"])
    first, logits = base_hash(model), None
    randomise(model)
    with torch.no_grad():
        model.classifier.bias.normal_()
    logits = model(**collate(samples())).logits
    assert base_hash(model) == first
    assert torch.equal(model(**collate(samples())).logits, logits)
    unload(model)
    with torch.no_grad():
        model.bert.pooler.dense.bias[0] += 1e-9
    sparsify(model, random_mask(model, 0.1, leave=("classifier.bias",)), always_train=["classifier.bias"])
    assert base_hash(model) != first


def test_refused() -> None:
    model = tiny("bert")
    mask = random_mask(model, 0.1)
    with pytest.raises(InputError, match="matches no parameter"):
        sparsify(model, mask, always_train=["clasifier"])
    with pytest.raises(InputError, match=r"classifier\.weight: found entries in a parameter that train.always_train"):
        sparsify(model, mask, always_train=["classifier"])
    with pytest.raises(InputError, match=r"x\.weight: the model has no such parameter"):
        sparsify(model, Mask({"x.weight": torch.tensor([0])}, {"x.weight": (3,)}))
    with pytest.raises(InputError, match=r"found shape \(3,\); expected \(3, 12\), the model's"):
        sparsify(model, Mask({"classifier.weight": torch.tensor([0])}, {"classifier.weight": (3,)}))
    for index in ([0, 0], [1, 0], [-1, 2], [2, 36]):
        with pytest.raises(InputError, match="expected sorted, distinct indices from 0 to 35"):
            sparsify(model, Mask({"classifier.weight": torch.tensor(index)}, {"classifier.weight": (3, 12)}))
    with pytest.raises(InputError, match="not a sparse model"):
        unload(model)
    sparsify(model, mask)
    with pytest.raises(InputError, match="sparse already"):
        sparsify(model, mask)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_model_trains_alike(family: str) -> None:
    """Gradients of every step, and values that were changed between the steps, reach the compiled model."""
    model, batch = tiny(family), collate(samples())
    sparsify(model, random_mask(model, 0.1))
    plain = copy.deepcopy(model)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="aot_eager")
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, plain)]
    seen = []
    for _ in range(3):
        losses = [compiled(**batch).loss, plain(**batch).loss]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
        for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(float(losses[0]))
    assert len(set(seen)) == 3
    with torch.no_grad():
        for m in (model, plain):
            for entries in entries_of(m).values():
                entries.values.data.add_(0.5)
        moved = float(compiled(**batch).loss)
        assert moved == pytest.approx(float(plain(**batch).loss), rel=1e-6)
    assert abs(moved - seen[-1]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_patches_all_parameters_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One conversion of indices for many parameters; one write for each; the bits of base plus delta."""
    model, batch = tiny("llama").to(dtype), collate(samples())
    sparsify(model, random_mask(model, 0.1))
    with torch.no_grad():
        for entries in entries_of(model).values():
            entries.values.copy_(torch.randn_like(entries.values))
    count = len(entries_of(model))
    # What is prepared once is no part of a pass.
    model(**batch)
    for at_once, groups in ((10**9, 1), (1, count)):
        monkeypatch.setattr("irdscale.sparse.entries.PATCHED_AT_ONCE", at_once)
        with torch.no_grad(), Counted() as counted:
            model(**batch)
        writes = counted.calls["aten.scatter_.src"] + counted.calls["aten.index_copy_.default"]
        assert (writes, counted.wide) == (count, groups)
        for entries in entries_of(model).values():
            expected = (entries.base + entries.values).to(dtype)
            assert torch.equal(entries.parameter.view(-1)[entries.index.long()], expected)


class Counted(TorchDispatchMode):
    """How often each operation ran, and how many one-dimensional int32 tensors became int64."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.wide = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function)] += 1
        result = function(*args, **(kwargs or {}))
        if str(function) == "aten._to_copy.default" and args[0].dtype == torch.int32 and args[0].dim() == 1:
            self.wide += result.dtype == torch.int64
        return result
