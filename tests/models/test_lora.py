"""LoRA matrices: the model that they change, and loading them from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.compare.methods import dense_candidate, fitting_methods, model_facts
from irdscale.config.loader import load_config
from irdscale.errors import InputError
from irdscale.models.build import build_model
from irdscale.models.lora import insert_lora
from irdscale.search.candidates import run_candidate, score_on_test
from irdscale.tasks import load_task
from irdscale.training.trainable import sparse_model
from irdscale.training.trainer import fine_tune
from irdscale.utils.progress import progress_listener
from tests.search.toy import write_config


def test_the_trained_model_is_the_base_and_twice_the_product(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, train__steps=3))
    task = load_task(config)
    model = sparse_model(config, task, None, 0, lora_rank=2)
    fine_tune(model, task, config, 0)
    plain, new = build_model(config, task, 0)
    state, moved = dict(model.named_parameters()), 0
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            layer, _, kind = name.rpartition(".")
            if f"{layer}.base_layer.{kind}" not in state:
                assert torch.equal(parameter, state[name]) == (name not in new)
                parameter.copy_(state[name])
                continue
            assert torch.equal(parameter, state[f"{layer}.base_layer.{kind}"])
            if kind == "weight":
                b, a = (state[f"{layer}.lora_{of}.default.weight"] for of in "BA")
                assert b.shape[1] == a.shape[0] == 2
                parameter += 2 * b @ a
                moved += bool(b.any())
    assert moved == len({name for name in state if "lora_B" in name}) > 3
    batch = {k: v for k, v in task.collate([task.train[i] for i in range(4)]).items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain.eval()(**batch).logits, rtol=1e-5, atol=1e-6)


def test_dense_methods_train_what_they_say_and_come_back_from_disk(tmp_path: Path) -> None:
    methods = ["lora", "bitfit", "linear_probe", "full"]
    path = write_config(tmp_path, train__steps=2, compare={"methods": methods, "reference": "full", "lora_rank": 2})
    config = load_config(path)
    task, output = load_task(config), tmp_path / "out"
    facts = model_facts(config, task, output, True)
    base = dict(build_model(config, task, 1)[0].named_parameters())
    heads = sum(base[name].numel() for name in facts.head)
    heard: list[tuple[Any, ...]] = []
    for method in fitting_methods(config, facts):
        candidate = dense_candidate(method, facts, 1e-2, 1)
        model = sparse_model(candidate.config(config), task, None, 1, candidate.lora_rank)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in trainable.values()) == facts.sizes[method.kind] + heads, method.name
        if method.kind == "bitfit":
            assert all(name.endswith("bias") or name in facts.head for name in trainable)
        record = run_candidate(config, task, output, candidate)
        assert record["status"] == "ok", record
        kept = score_on_test(config, task, output, [(candidate, False)])
        (output / "candidates" / candidate.key(config)).rename(tmp_path / method.name)
        # Trained again, it is the same; a cluster hears that it goes on, and does not end it as silent.
        heard.clear()
        with progress_listener(lambda *facts: heard.append(facts)):
            assert score_on_test(config, task, output, [(candidate, False)]) == kept
        assert ("Training", 2, 2, "") in heard


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    class Norm(torch.nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(InputError, match="lora: found no linear layer in Norm"):
        insert_lora(Norm(), 2, 0, [])


def test_methods_that_the_model_has_no_parameters_for(tmp_path: Path) -> None:
    config: Any = load_config(write_config(tmp_path))
    task = load_task(config)
    facts = model_facts(config, task, tmp_path, False)
    bare = type(facts)([], [], facts.sizes, facts.model)
    assert {m.kind for m in fitting_methods(config, facts)} - {m.kind for m in fitting_methods(config, bare)} == {
        "bitfit",
        "linear_probe",
    }

    def asking(*methods: str, **changes: Any) -> Any:
        compare = config.compare.model_copy(update={"methods": list(methods), **changes})
        return config.model_copy(update={"compare": compare})

    for methods, line in (
        (("ird", "bitfit"), "compare.methods: found bitfit, but the model has no biases"),
        (("ird", "linear_probe"), "compare.methods: found linear_probe, but the model has no new head"),
        (("fish", "fish_best"), "compare.methods: found fish_best without ird"),
    ):
        with pytest.raises(InputError, match=line):
            fitting_methods(asking(*methods, reference=methods[0]), bare)
