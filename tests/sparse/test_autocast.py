"""Sparse models under autocast, against the dense model under the same autocast.

Both compute the same products of the same numbers, so logits are equal to the bit. A gradient's entry is one sum that
is rounded to the lower type once, there and, by some ways of computing it, here: twice its unit roundoff.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from irdscale import Mask, sparsify
from irdscale.sparse import entries_of, products
from tests.fisher.families import configs, rows_for
from tests.sparse.oracle import random_mask
from tests.tiny_models import collate, config_of

ROUNDED = {torch.bfloat16: 2**-8, torch.float16: 2**-10}
LOWER = list(ROUNDED)


def dense_model(config: Any, experts: str = "eager") -> Any:
    """A float32 classifier of 3 classes whose every parameter matters."""
    torch.manual_seed(0)
    config.num_labels = 3
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_config(config, experts_implementation=experts).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def sparse_of(dense: nn.Module, share: float = 0.3) -> Any:
    return sparsify(copy.deepcopy(dense), random_mask(dense, share))


def lowered_pass(model: Any, batch: dict[str, Tensor], dtype: torch.dtype, inside: bool = False) -> Tensor:
    """The logits; the gradients are left in the model, of a loss that is scaled as float16 needs it."""
    with torch.autocast("cpu", dtype):
        output = model(**batch)
        loss = output.loss * 1024
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return output.logits.detach()


def assert_like_dense(sparse: nn.Module, dense: nn.Module, dtype: torch.dtype) -> None:
    seen = 0
    for name, entries in entries_of(sparse).items():
        expected, found = dense.get_parameter(name).grad, entries.values.grad
        if expected is None:
            assert found is None or not found.any(), name
            continue
        assert found is not None, name
        assert found.dtype == torch.float32
        at = expected.view(-1)[entries.index.long()]
        torch.testing.assert_close(found, at, rtol=ROUNDED[dtype], atol=1e-6, msg=name)
        seen += int(found.count_nonzero())
    assert seen > 100


@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("family", ["BERT", "GPT-2", "Llama", "ALBERT", "DeBERTa-v2", "Mixtral", "Qwen3-MoE", "T5"])
def test_families(family: str, dtype: torch.dtype) -> None:
    config = configs()[family]
    dense, batch = dense_model(config), collate(rows_for(config))
    sparse = sparse_of(dense)
    logits = [lowered_pass(model, batch, dtype) for model in (sparse, dense)]
    assert torch.equal(*logits)
    assert_like_dense(sparse, dense, dtype)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_experts_in_one_parameter(experts: str) -> None:
    config = configs()["Qwen2-MoE"]
    dense, batch = dense_model(config, experts), collate(rows_for(config))
    sparse = sparse_of(dense)
    assert any("experts" in name and len(e.shape) == 3 for name, e in entries_of(sparse).items())
    assert torch.equal(*[lowered_pass(model, batch, torch.bfloat16) for model in (sparse, dense)])
    assert_like_dense(sparse, dense, torch.bfloat16)


@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("taken", [(False, False), (True, True)])
@pytest.mark.parametrize("kind", ["dense", "sampled"])
@pytest.mark.parametrize("inside", [False, True])
def test_every_product(
    kind: str, taken: tuple[bool, bool], dtype: torch.dtype, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the backward pass inside autocast too, where PyTorch's own operations are lowered again."""
    monkeypatch.setattr(products, "choose", lambda *_: (kind, taken))
    config = config_of("gpt2")
    dense, batch = dense_model(config), collate(rows_for(config))
    sparse = sparse_of(dense, 0.05)
    assert torch.equal(*[lowered_pass(model, batch, dtype, inside) for model in (sparse, dense)])
    assert_like_dense(sparse, dense, dtype)


class Mixed(nn.Module):
    """A convolution, normalisation, a weight used past its module, attention of PyTorch's, and a part in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.exact = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(input_ids))
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.twice(torch.tanh(self.twice(x))) @ self.twice.weight
        with torch.autocast("cpu", enabled=False):
            x = self.exact(x.float())
            with torch.autocast("cpu", torch.float16):
                x = x + self.exact(x)
        return self.head(x).sum(1)


@pytest.mark.parametrize("dtype", LOWER)
def test_other_modules_and_nested_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = Mixed()
    sparse = sparse_of(dense)
    logits = []
    for model in (sparse, dense):
        with torch.autocast("cpu", dtype):
            logits.append(model(torch.arange(40).view(4, 10)))
        nn.functional.cross_entropy(logits[-1].float(), torch.tensor([0, 1, 2, 0])).mul(1024).backward()
    assert torch.equal(*logits)
    # Of weights used twice each use's gradient is rounded, before they are added.
    for name, entries in entries_of(sparse).items():
        at = dense.get_parameter(name).grad.view(-1)[entries.index.long()]
        torch.testing.assert_close(
            entries.values.grad, at, rtol=0, atol=ROUNDED[dtype] * float(at.abs().max()), msg=name
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    config = config_of("llama")
    dense, batch = dense_model(config), collate(rows_for(config))
    plain, checkpointed = sparse_of(dense), sparse_of(dense)
    for model in (plain, checkpointed):
        model.train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    assert torch.equal(*[lowered_pass(model, batch, torch.bfloat16) for model in (plain, checkpointed)])
    for name, entries in entries_of(plain).items():
        assert torch.equal(entries.values.grad, entries_of(checkpointed)[name].values.grad), name


def test_a_compiled_model() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Embedding(40, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    sparse = sparse_of(dense)
    torch.compiler.reset()
    compiled: Any = torch.compile(sparse, backend="eager")
    for _ in range(2):
        outputs = []
        for model in (compiled, dense):
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(model(torch.arange(40)))
            outputs[-1].square().sum().backward()
        assert outputs[0].dtype == torch.bfloat16
        assert torch.equal(*outputs)
    assert_like_dense(sparse, dense, torch.bfloat16)


def test_float16_with_a_scaler_steps_and_skips() -> None:
    """The first scale makes gradients infinite, which the scaler sees in the values; later steps are made."""
    config = config_of("gpt2")
    dense, batch = dense_model(config), collate(rows_for(config))
    sparse = sparse_of(dense)
    values = [entries.values for entries in entries_of(sparse).values()]
    optimizer = torch.optim.AdamW(values, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    losses, moved = [], []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = sparse(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
        moved.append(any(bool(v.any()) for v in values))
    assert not moved[0]
    assert moved[-1]
    assert all(bool(v.isfinite().all()) for v in values)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_another_lower_type(dtype: torch.dtype) -> None:
    """Patching is no matter of autocast, which has no rule for some mixtures of types."""
    config = config_of("llama")
    batch = collate(rows_for(config))
    dense = dense_model(config).to(torch.float16)
    sparse = sparse_of(dense)
    assert torch.equal(*[lowered_pass(model, batch, dtype) for model in (sparse, dense)])


def test_a_users_trainer(tmp_path: Path) -> None:
    config = config_of("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = dense_model(config)
    names = [n for n, _ in model.named_parameters() if not n.startswith("classifier")]
    mask = random_mask(model, 0.3, leave=tuple({n for n, _ in model.named_parameters()} - set(names)))
    sparsify(model, Mask(mask.indices, mask.shapes), always_train=["^classifier"])
    before = float(model(**collate(rows_for(config))).loss.detach())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        learning_rate=1e-2,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(model=model, args=arguments, train_dataset=rows_for(config), data_collator=collate).train()
    assert float(model.eval()(**collate(rows_for(config))).loss.detach()) < before
