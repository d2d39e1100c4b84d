"""The head that Fisher passes see, against one warmed by hand; what is trained afterwards begins without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from irdscale import Mask, accumulate_fisher, sparsify, top_k
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.fisher.pool import draw_samples
from irdscale.models.build import build_model
from irdscale.sparse.model import trained_numbers
from irdscale.tasks import load_task
from irdscale.training.head_warmup import model_to_score
from irdscale.training.one_mask import run_fisher, run_train
from irdscale.training.trainer import fine_tune
from tests.search.toy import write_config

STEPS = 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("warmup")
    overrides = [f"fisher.head_warmup={STEPS}", "fisher.dtype=float64", f"output={folder / 'warm'}"]
    return load_config(write_config(folder), overrides)


def test_passes_see_a_head_that_was_trained_alone(config: RunConfig) -> None:
    task = load_task(config)
    by_hand, new = build_model(config, task, 0)
    sparsify(by_hand, Mask({}, {}), [f"^{name}$" for name in new])
    few = config.model_copy(update={"train": config.train.model_copy(update={"steps": STEPS})})
    fine_tune(by_hand, task, few, 0)
    _, head = trained_numbers(by_hand)
    cold, _ = build_model(config, task, 0)
    with model_to_score(config, task, progress=False) as (model, whole):
        pass
    assert set(whole) == set(new) == set(head)
    start = dict(cold.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(start)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, head.get(name, start[name])), name
        assert torch.equal(parameter, start[name]) is (name not in new)
    with torch.no_grad():
        for name, value in head.items():
            start[name].copy_(value)
    pool = task.train.select(draw_samples(config, task, 16, "pool"))
    exclude = [f"^{name}$" for name in new]
    fisher = accumulate_fisher(cold, pool, collate_fn=task.collate, exclude=exclude, dtype=torch.float64, batch_size=4)
    found = run_fisher(config, progress=False)
    assert found["hash"] == top_k(fisher, found["params"]).hash
    written = json.loads((Path(config.output) / "traces.json").read_text())["trace"]
    assert written == fisher.sample_trace.tolist()
    untrained = config.model_copy(update={"fisher": config.fisher.model_copy(update={"head_warmup": 0})})
    other = run_fisher(untrained.model_copy(update={"output": f"{config.output}-cold"}), progress=False)
    assert other["hash"] != found["hash"]


def test_training_begins_with_the_fresh_head(config: RunConfig, tmp_path: Path) -> None:
    warm = run_train(config.model_copy(update={"output": str(tmp_path / "a")}), progress=False)
    untrained = config.model_copy(
        update={"output": str(tmp_path / "b"), "fisher": config.fisher.model_copy(update={"head_warmup": 0})}
    )
    cold = run_train(untrained, mask=str(tmp_path / "a/mask"), progress=False)
    assert cold["mask"] == warm["mask"]
    first, second = ((Path(run["adapter"]) / "adapter.safetensors").read_bytes() for run in (warm, cold))
    assert first == second


def test_a_model_without_a_new_head_has_none_to_warm(config: RunConfig, tmp_path: Path) -> None:
    task = load_task(config)
    build_model(config, task, 0)[0].save_pretrained(tmp_path)
    task.tokenizer.save_pretrained(tmp_path)
    complete = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path)})})
    refused = pytest.raises(InputError, match=r"^fisher.head_warmup: found 20; expected 0, because the checkpoint")
    with refused, model_to_score(complete, task, progress=False):
        pass
