"""What a user's own code gets of a sparse model: written, copied, moved, converted or changed, against `merge`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from irdscale import Mask, load_adapter, merge, save_adapter, sparsify, unload
from irdscale.errors import InputError
from irdscale.sparse import base_hash, entries_of, sparse_state, trained_numbers
from tests.sparse.oracle import random_mask
from tests.tiny_models import FAMILIES, collate, samples, tiny

ROWS = samples("lm")


def drawn(model: nn.Module, size: float = 1.0, seed: int = 5) -> nn.Module:
    """The sparse model with random deltas, and a random head where that is trained whole; weights are stale."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for entries in sparse_state(model).patched:
            entries.values.normal_().mul_(size)
        for name in sparse_state(model).dense:
            dict(model.named_parameters())[name].normal_()
    return model


def sparse(family: str = "llama", head: str = "lm", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A sparse model that has run once, and was changed since."""
    model = tiny(family, head, **more).to(dtype)
    whole = [n for n, _ in model.named_parameters() if n.startswith(("classifier", "score"))]
    sparsify(model, random_mask(model, 0.1, leave=tuple(whole)), always_train=[f"^{n}$" for n in whole])
    rows = ROWS if head == "lm" else samples(head)
    model(**inputs(rows))
    return drawn(model)


def inputs(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {k: v for k, v in collate(rows).items() if k != "labels"}


def logits(model: Any, rows: list[dict[str, Any]] = ROWS) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(rows)).logits


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_dict_holds_the_effective_weights_of_that_moment(family: str, dtype: torch.dtype) -> None:
    model = sparse(family, "classification", dtype)
    expected = merge(copy.deepcopy(model)).state_dict()
    same(model.state_dict(), expected)
    drawn(model, seed=6)
    expected = merge(copy.deepcopy(model)).state_dict()
    same(model.state_dict(), expected)
    part = next(name for name, _ in model.named_children())
    drawn(model, seed=7)
    expected = merge(copy.deepcopy(model)).get_submodule(part).state_dict()
    same(model.get_submodule(part).state_dict(), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_writes_a_plain_checkpoint(tied: bool, tmp_path: Path) -> None:
    model = sparse(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    read, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    merged = merge(copy.deepcopy(model))
    assert torch.equal(logits(read), logits(merged))
    same(dict(read.named_parameters()), dict(merged.named_parameters()))


class Kept(TrainerCallback):
    """Copies the model after each step."""

    def __init__(self) -> None:
        self.copies: list[Any] = []

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.copies.append(copy.deepcopy(model))


def trainer(model: Any, folder: Path, steps: int, *callbacks: Any, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        logging_strategy="no",
        **{"save_strategy": "no", "lr_scheduler_type": "constant"} | more,
    )
    return Trainer(model=model, args=arguments, train_dataset=ROWS, data_collator=collate, callbacks=list(callbacks))


def test_a_users_trainer_saves_each_moment_and_goes_on(tmp_path: Path) -> None:
    """Its checkpoints are what the model was then, its copies independent, and a resume the uninterrupted training."""
    kept, model = Kept(), sparse(dtype=torch.float64)
    own = trainer(model, tmp_path, 4, kept, save_strategy="steps", save_steps=2)
    own.train()
    own.save_model(str(tmp_path / "end"))
    for name, expected in (("checkpoint-2", kept.copies[1]), ("checkpoint-4", model), ("end", kept.copies[3])):
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(read), logits(expected)), name
    again = sparse(dtype=torch.float64)
    trainer(again, tmp_path, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, entries in entries_of(again).items():
        # The file holds sums of base and delta, each rounded once: 2^-51 of numbers below 4, before two steps of AdamW.
        torch.testing.assert_close(entries.values, entries_of(model)[name].values, rtol=0, atol=1e-11, msg=name)
    assert not torch.equal(logits(kept.copies[1]), logits(again))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_is_an_independent_sparse_model(way: str, dtype: torch.dtype) -> None:
    def copied(model: nn.Module) -> Any:
        if way == "deepcopy":
            return copy.deepcopy(model)
        if way == "pickle":
            return pickle.loads(pickle.dumps(model))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    model = sparse(dtype=dtype, tie_word_embeddings=True)
    made, before, deltas = copied(model), logits(model), trained_numbers(model)[0]
    assert torch.equal(logits(made), before)
    same(trained_numbers(made)[0], deltas)
    drawn(made, seed=8)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(made), before)
    made(**collate(ROWS)).loss.backward()
    assert all(e.values.grad is not None for e in entries_of(made).values())
    assert all(e.values.grad is None for e in entries_of(model).values())
    hashes = {base_hash(m) for m in (made, model)}
    assert len(hashes) == 1
    after = logits(made)
    assert torch.equal(logits(merge(copied(made))), after)
    plain = unload(made)
    assert not plain._forward_pre_hooks
    assert torch.equal(logits(plain), logits(unload(model)))


@pytest.mark.parametrize("way", ["parameters", "state_dict"])
def test_a_moving_average_of_weights(way: str) -> None:
    model, plain = sparse(), merge(copy.deepcopy(sparse()))
    average, expected = copy.deepcopy(model), copy.deepcopy(plain)

    def update(mean: nn.Module, new: nn.Module, way: str) -> None:
        def of(m: nn.Module) -> Any:
            return m.state_dict().values() if way == "state_dict" else m.parameters()

        with torch.no_grad():
            for old, tensor in zip(of(mean), of(new), strict=True):
                old.mul_(0.9).add_(tensor, alpha=0.1)

    for seed in (6, 7):
        drawn(model, seed=seed)
        update(average, model, way)
        update(expected, merge(copy.deepcopy(model)), "state_dict")
        # Each of two updates rounds numbers below 8 some four times: 2^-22 each.
        torch.testing.assert_close(
            merge(copy.deepcopy(average)).state_dict(), expected.state_dict(), rtol=0, atol=4 * 2**-22
        )
        logits(average)


@pytest.mark.filterwarnings("ignore:load_state_dict")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_loading_a_state_dict_gives_its_weights(tied: bool, dtype: torch.dtype) -> None:
    model = sparse(dtype=dtype, tie_word_embeddings=tied)
    state = copy.deepcopy(model.state_dict())
    before, base = logits(model), base_hash(model)
    drawn(model, seed=9)
    result = model.load_state_dict(state)
    assert not result.missing_keys
    assert torch.equal(logits(model), before)
    assert base_hash(model) == base
    wider = {name: tensor.double() for name, tensor in state.items()}
    drawn(model, seed=10)
    model.load_state_dict(wider)
    same(model.state_dict(), state)
    plain = unload(copy.deepcopy(model))
    assert model.load_state_dict(plain.state_dict()).unexpected_keys == []
    assert all(not e.values.any() for e in entries_of(model).values())
    with pytest.raises(InputError, match=r"load_state_dict\(assign=True\): not possible for a sparse model; unload"):
        model.load_state_dict(state, assign=True)
    first = next(iter(entries_of(model)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, first: torch.zeros(3)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: tensor for name, tensor in state.items() if name != first})


def test_a_file_with_deltas_of_an_older_version_still_loads() -> None:
    model = sparse()
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = logits(model)
    drawn(model, seed=9)
    model.load_state_dict(state)
    assert torch.equal(logits(model), before)


def test_weights_of_a_lower_precision_are_said_to_round_the_deltas() -> None:
    model = sparse(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="round a sparse model.s float32 deltas; expected .* save_adapter"):
        model.load_state_dict(model.state_dict())


def test_what_is_written_into_a_weight_stays() -> None:
    model, expected = sparse(), merge(copy.deepcopy(sparse()))
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        for m in (model, expected):
            m.get_parameter(name).mul_(2)
    assert torch.equal(trained_numbers(model)[0][name], trained_numbers(copy.deepcopy(model))[0][name])
    # The delta is rounded, and its sum with the base: numbers below 8.
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=2**-22)
    assert not torch.equal(logits(model), logits(sparse()))


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(dtype=torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
    "there and back": lambda m: m.bfloat16().float(),
    "cpu": lambda m: m.cpu().to("cpu"),
}


@pytest.mark.parametrize("way", CONVERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_model_holds_the_converted_weights(way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = sparse(dtype=dtype, tie_word_embeddings=True)
    expected, base = merge(copy.deepcopy(model)), unload(copy.deepcopy(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for m in (model, expected, base):
        assert CONVERSIONS[way](m) is m
    assert torch.equal(logits(model), logits(expected))
    same(model.state_dict(), expected.state_dict())
    wide = torch.float64 if way == "double" else torch.float32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {wide}
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    before = logits(model)
    model(**collate(ROWS)).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(unload(model)), logits(base))


def test_a_model_without_data() -> None:
    model = sparse(tie_word_embeddings=True).to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.lm_head.weight.shape == (40, 12)
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    with pytest.raises(InputError, match="to_empty: it would lose the trained parameters; unload or merge"):
        model.to_empty(device="cpu")


def test_gradients_required_or_not() -> None:
    model = sparse(head="classification")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained
    assert not any(p.requires_grad for p in model.requires_grad_(False).parameters())
    assert {n for n, p in model.requires_grad_(True).named_parameters() if p.requires_grad} == trained
    model.train()
    assert model.training
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in model.eval().modules())


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_embeddings(tied: bool) -> None:
    model = sparse(tie_word_embeddings=tied)
    before = logits(model)
    for part in (model, model.model):
        for arguments in ({"new_num_tokens": 44}, {"new_num_tokens": 8}, {"pad_to_multiple_of": 64}):
            with pytest.raises(InputError, match=r"resize_token_embeddings: .* unload or merge the sparse model first"):
                part.resize_token_embeddings(**arguments)
        with pytest.raises(InputError, match="set_input_embeddings: found trained entries in the embeddings; unload"):
            part.set_input_embeddings(nn.Embedding(44, 12))
    with pytest.raises(InputError, match="set_output_embeddings: found trained entries in the embeddings; unload"):
        model.set_output_embeddings(nn.Linear(12, 44))
    assert torch.equal(logits(model), before)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.resize_token_embeddings(40) is model.get_input_embeddings()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith("_values")
    }
    model.tie_weights()
    assert torch.equal(logits(model), before)
    assert merge(model).resize_token_embeddings(44).weight.shape == (44, 12)


def test_embeddings_that_are_not_trained_are_resized() -> None:
    model = tiny("llama", "lm", tie_word_embeddings=False).float()
    name = "model.layers.0.mlp.up_proj.weight"
    sparsify(model, Mask({name: torch.tensor([3, 9])}, {name: tuple(model.get_parameter(name).shape)}))
    drawn(model)
    before = logits(model)
    model.resize_token_embeddings(44)
    assert torch.equal(logits(model)[..., :40], before)
    model(**collate(ROWS)).loss.backward()
    head = tiny("llama", "lm", tie_word_embeddings=False)
    sparsify(head, Mask({}, {}), always_train=["lm_head"])
    with pytest.raises(InputError, match="resize_token_embeddings: "):
        head.resize_token_embeddings(44)


def test_tying_what_was_not_tied_is_refused() -> None:
    model = sparse(tie_word_embeddings=False)
    before, shared = logits(model), dict(model.named_parameters())
    model.config.tie_word_embeddings = True
    with pytest.raises(InputError, match="tie_weights: found trained entries in parameters that it would tie; unload"):
        model.tie_weights()
    assert torch.equal(logits(model), before)
    assert all(p is shared[n] for n, p in model.named_parameters())


def test_data_parallel_names_a_way_that_trains() -> None:
    model = sparse()
    with pytest.raises(InputError, match=r"DataParallel: .* torchrun"):
        model.lm_head._replicate_for_data_parallel()
