"""Padding, causality and models' own losses in training and evaluation by a configuration."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.models.build import build_model
from irdscale.models.checks import padding_matters, uneven_rows, warn_once
from irdscale.tasks import Task, load_task
from irdscale.training import evaluate_language
from irdscale.training.control import Control
from irdscale.training.evaluate import evaluate_model
from irdscale.training.trainable import sparse_model
from irdscale.training.trainer import fine_tune, training_order
from tests.helpers import tiny_tokenizer
from tests.sparse.oracle import random_mask
from tests.training.test_evaluate_language import texts

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "max_position_embeddings": 64, "intermediate_size": 32}
CLASSES: dict[str, Any] = {"kind": "sequence-classification", "columns": {"text": ["q"], "label": "a"}}
SFT: dict[str, Any] = {"kind": "sft", "columns": {"prompt": "q", "completion": "a"}}


def made(folder: Path, config: Any, task: dict[str, Any], side: str = "right", **train: Any) -> tuple[RunConfig, Task]:
    tokenizer = tiny_tokenizer(folder / "model", "bert" if task is CLASSES else "llama")
    file = folder / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": side}))
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    torch.manual_seed(0)
    auto = transformers.AutoModel if task is CLASSES else transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder / "model")
    rows = [{"q": q, "a": a} for q, a in zip(texts(24, 0), texts(24, 1), strict=True)]
    if task is CLASSES:
        rows = [{**row, "a": i % 2} for i, row in enumerate(rows)]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run = RunConfig.model_validate(
        {
            "model": {"path": str(folder / "model")},
            "task": {"dataset": str(folder), "max_length": 32, **task},
            "fisher": {"samples": 8},
            "search": {"min_samples": 1},
            "train": {"steps": 1, "batch_size": 4, **train},
        }
    )
    warn_once.cache_clear()
    return run, load_task(run)


def trained(config: RunConfig, task: Task, control: Control | None = None) -> None:
    model, new = build_model(config, task, 0)
    fine_tune(sparse_model(config, task, random_mask(model, 0.1, leave=tuple(new)), 0), task, config, 0, control)


def test_evaluation_pads_nothing_where_padding_matters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, task = made(tmp_path, transformers.FNetConfig(**SIZES, intermediate_size=32), CLASSES)
    model, _ = build_model(config, task, 0)
    alone = torch.stack(
        [model(**{k: v for k, v in task.collate([r]).items() if k != "labels"}).logits[0] for r in task.test]
    )
    right = float((alone.argmax(1) == torch.tensor(list(task.test["labels"]))).float().mean())
    with caplog.at_level(logging.WARNING):
        found = [evaluate_model(model, task, task.test, size)["accuracy"] for size in (8, 24, 8)]
    assert found == [pytest.approx(right)] * 3
    assert [r.getMessage()[:21] for r in caplog.records] == ["train.eval_batch_size"]
    caplog.clear()
    trained(config, task)
    assert [r.getMessage()[:16] for r in caplog.records] == ["train.batch_size"]


def test_nothing_is_said_of_models_that_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, task = made(tmp_path, transformers.BertConfig(**SIZES, **HEADS), CLASSES, side="left")
    trained(config, task)
    evaluate_model(build_model(config, task, 0)[0], task, task.test, 8)
    assert not caplog.records
    assert task.tokenizer.padding_side == "right"


def test_a_model_that_needs_its_padding_on_the_left_has_it_there(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "initializer_range": 0.3}
    for side in ("left", "right"):
        config, task = made(tmp_path / side, transformers.XLNetConfig(**sizes), CLASSES, side=side)
        model, _ = build_model(config, task, 0)
        assert task.tokenizer.padding_side == side
        rows = uneven_rows(task.train, task.collate)
        assert padding_matters(model, task.collate, rows) is (side == "right")


def test_an_encoder_is_neither_trained_nor_measured_as_a_language_model(tmp_path: Path) -> None:
    config, task = made(tmp_path, transformers.BertConfig(**SIZES, **HEADS), SFT)
    with pytest.raises(InputError, match="BertLMHeadModel: found logits of a token that change with later tokens"):
        trained(config, task)
    with pytest.raises(InputError, match="expected a causal language model"):
        evaluate_model(build_model(config, task, 0)[0], task, task.test, 8)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("coefficient", [0.5, None])
def test_training_takes_a_loss_of_the_models_own(
    coefficient: float | None, accumulation: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {} if coefficient is None else {"output_router_logits": True, "router_aux_loss_coef": coefficient}
    mixtral = transformers.MixtralConfig(**SIZES, **HEADS, num_key_value_heads=2, num_local_experts=4, **asked)
    config, task = made(tmp_path, mixtral, SFT, gradient_accumulation=accumulation)
    seen: list[float] = []
    trained(config, task, Control(seen=lambda step, loss, rate: seen.append(loss)))
    model, _ = build_model(config, task, 0)
    order = training_order(len(task.train), 4, 0)
    size = 4 // accumulation
    with torch.no_grad():
        batches = [task.collate([task.train[i] for i in order[start : start + size]]) for start in range(0, 4, size)]
        own = [float(model(**batch).loss) for batch in batches]
    said = [r for r in caplog.records if "own loss of MixtralForCausalLM" in r.getMessage()]
    assert len(said) == (coefficient is not None)
    if coefficient is not None:
        assert seen == [pytest.approx(sum(own) / accumulation, rel=1e-4)]
    elif accumulation == 1:
        assert seen == [pytest.approx(own[0], rel=1e-4)]


class ByPlace(transformers.GPT2LMHeadModel):
    """Generates without telling where a padded prompt begins."""

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:
        return {**super().prepare_inputs_for_generation(input_ids, **kwargs), "position_ids": None}


def test_answers_to_prompts_of_equal_length_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    gpt2 = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    config, task = made(tmp_path, gpt2, SFT | {"metric": "exact_match", "max_new_tokens": 4})
    model = build_model(config, task, 0)[0]
    answers: list[str] = []
    monkeypatch.setattr(evaluate_language, "same_answer", lambda found, _expected: not answers.append(found))
    for kind in (transformers.GPT2LMHeadModel, ByPlace):
        model.__class__ = kind
        found = []
        for size in (1, 8):
            answers.clear()
            evaluate_model(model, task, task.test, size)
            found.append(sorted(answers))
        assert found[0] == found[1]
        said = [r.getMessage() for r in caplog.records if r.name == "irdscale.models.checks"]
        assert len(said) == (kind is ByPlace), said
    assert "what ByPlace generates depends on how far its batch is padded" in said[0]
