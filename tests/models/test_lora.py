"""LoRA matrices: the model that they change, and loading them from disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale.compare.methods import dense_candidate, far_from_budget, fitting_methods, model_facts
from irdscale.config.compare import LoraConfig
from irdscale.config.loader import load_config
from irdscale.errors import InputError
from irdscale.masks.mask import Mask
from irdscale.models.build import build_model
from irdscale.models.lora import insert_lora, lora_layers, lora_rank, lora_size
from irdscale.search.candidates import Candidate, run_candidate, score_on_test
from irdscale.search.ird import Pair
from irdscale.search.mask_store import keep_mask
from irdscale.tasks import load_task
from irdscale.training.trainable import sparse_model
from irdscale.training.trainer import fine_tune
from irdscale.utils.progress import progress_listener
from tests.search.toy import write_config


def effective(layer: Any, lora: LoraConfig, scale: float) -> torch.Tensor:
    """The weight that a layer with an adapter multiplies by, from the papers."""
    weight = layer.base_layer.weight
    if lora.form == "shira":
        rows, columns = layer.shira_indices["default"].long()
        return weight.index_put((rows, columns), layer.shira_weight["default"], accumulate=True)
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert b.shape[1] == a.shape[0] == lora.rank
    whole = weight + scale * b @ a
    if lora.form == "dora":
        whole = whole * (layer.lora_magnitude_vector["default"].weight / whole.norm(dim=1)).unsqueeze(1)
    return whole


@pytest.mark.parametrize(
    ("lora", "scale"),
    [
        (LoraConfig(rank=2), 2.0),
        (LoraConfig(rank=4, alpha=3.0, rslora=True), 1.5),
        (LoraConfig(rank=2, form="dora"), 2.0),
        (LoraConfig(rank=2, form="shira"), 0.0),
    ],
)
def test_the_trained_model_is_the_base_and_its_adapter(tmp_path: Path, lora: LoraConfig, scale: float) -> None:
    config = load_config(write_config(tmp_path, train__steps=3))
    task = load_task(config)
    model = sparse_model(config, task, None, 0, lora=lora)
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
                found = effective(model.get_submodule(layer), lora, scale)
                moved += not torch.equal(found, parameter)
                parameter.copy_(found)
    wrapped = sum(hasattr(module, "base_layer") for module in model.modules())
    assert moved == wrapped > 3
    batch = {k: v for k, v in task.collate([task.train[i] for i in range(4)]).items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain.eval()(**batch).logits, rtol=1e-5, atol=1e-6)


def test_a_mask_and_matrices_are_trained_together(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, train__steps=2))
    task, output = load_task(config), tmp_path / "out"
    plain, new = build_model(config, task, 0)
    shapes = {name: tuple(p.shape) for name, p in plain.named_parameters() if name not in new}
    # A weight and a bias that matrices wrap, and one that they do not.
    names = [next(n for n in shapes if n.endswith(end)) for end in ("query.weight", "key.bias", "LayerNorm.weight")]
    mask = Mask({name: torch.tensor([1, 3], dtype=torch.int32) for name in names}, {n: shapes[n] for n in names})
    keep_mask(mask, output)
    lora = LoraConfig(rank=1, targets=["query", "key"])
    model = sparse_model(config, task, mask, 0, lora=lora)
    values = {name: p for name, p in model.named_parameters() if name.endswith("_values")}
    assert sum(p.numel() for p in values.values()) == mask.k == 6
    size = lora_size(lora_layers(plain, lora, new), lora, 1)
    heads = sum(plain.get_parameter(name).numel() for name in new)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == mask.k + size + heads
    fine_tune(model, task, config, 0)
    assert all(p.detach().abs().min() > 0 for p in values.values())
    assert all(p.detach().any() for name, p in model.named_parameters() if ".lora_B" in name)
    candidate = Candidate(mask.hash, Pair(16, mask.k + size), 0, None, "sparse_lora", None, lora)
    assert candidate.key(config) != replace(candidate, lora=None).key(config)
    record = run_candidate(config, task, output, candidate)
    assert record["status"] == "ok", record
    kept = score_on_test(config, task, output, [(candidate, False)])
    (output / "candidates" / candidate.key(config)).rename(tmp_path / "moved")
    assert score_on_test(config, task, output, [(candidate, False)]) == kept


def test_dense_methods_train_what_they_say_and_come_back_from_disk(tmp_path: Path) -> None:
    methods = ["lora", "dora", "shira", "bitfit", "linear_probe", "full"]
    path = write_config(
        tmp_path, train__steps=2, compare={"methods": methods, "reference": "full", "lora": {"rank": 2}}
    )
    config = load_config(path)
    task, output = load_task(config), tmp_path / "out"
    facts = model_facts(config, task, output, True)
    base = dict(build_model(config, task, 1)[0].named_parameters())
    heads = sum(base[name].numel() for name in facts.head)
    heard: list[tuple[Any, ...]] = []
    for method in fitting_methods(config, facts):
        candidate = dense_candidate(method, facts, 1e-2, 1)
        model = sparse_model(candidate.config(config), task, None, 1, candidate.lora)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in trainable.values()) == candidate.pair.params + heads, method.name
        if method.kind == "bitfit":
            assert all(name.endswith("bias") or name in facts.head for name in trainable)
        record = run_candidate(config, task, output, candidate)
        assert record["status"] == "ok", record
        saved = output / "candidates" / candidate.key(config) / "adapter.safetensors"
        assert record["adapter_bytes"] == saved.stat().st_size
        assert (record["peak_bytes"] is None) is not torch.cuda.is_available()
        kept = score_on_test(config, task, output, [(candidate, False)])
        (output / "candidates" / candidate.key(config)).rename(tmp_path / method.name)
        # Trained again, it is the same; a cluster hears that it goes on, and does not end it as silent.
        heard.clear()
        with progress_listener(lambda *facts: heard.append(facts)):
            assert score_on_test(config, task, output, [(candidate, False)]) == kept
        assert [note[:5] for *told, note in heard if told == ["Training", 2, 2]] == ["loss "]


def test_targets_and_the_nearest_rank(tmp_path: Path) -> None:
    variants = {
        "near": ["lora", "compare.lora.rank=auto", "compare.lora.targets=[query, value]"],
        "far": ["rslora", "compare.lora.rank=auto", "search.ratio=0.001"],
        "norms": ["dora", "compare.lora.rank=auto"],
        "entries": ["shira", "compare.lora.rank=auto"],
    }
    compare = {"variants": variants, "methods": [*variants, "lora"]}
    config = load_config(write_config(tmp_path, compare=compare, search__min_ratio=0.001))
    task = load_task(config)
    facts = model_facts(config, task, tmp_path, True)
    model, new = build_model(config, task, 0)
    total = sum(p.numel() for p in model.parameters())
    methods = {method.name: method for method in fitting_methods(config, facts)}
    for name, method in methods.items():
        candidate = dense_candidate(method, facts, 1e-3, 0)
        fresh = build_model(config, task, 0)[0]
        assert candidate.lora is not None
        matrices = insert_lora(fresh, candidate.lora, 0, new)
        assert (
            sum(fresh.get_parameter(matrix).numel() for matrix in matrices)
            == facts.sizes[name]
            == candidate.pair.params
        )
        if name == "near":
            assert {matrix.split(".lora_")[0].rpartition(".")[2] for matrix in matrices} == {"query", "value"}
    # One rank more or less is further from the mask's 5 %.
    unit, k = facts.sizes["near"] // facts.ranks["near"], round(0.05 * total)
    assert abs(facts.sizes["near"] - k) <= unit / 2
    assert facts.ranks["far"] == 1
    assert facts.ranks["lora"] == 8
    warned = {line.split()[0]: line for line in far_from_budget(list(methods.values()), facts)}
    budgets = {name: round(0.001 * total) if name == "far" else k for name in variants}
    assert warned.keys() == {name for name, k in budgets.items() if not 0.95 * k <= facts.sizes[name] <= 1.05 * k}
    assert f"with the nearest rank (1), a mask {round(0.001 * total):,} (+" in warned["far"]
    keys = {dense_candidate(method, facts, 1e-3, 0).key(config) for method in methods.values()}
    assert len(keys) == 5
    with pytest.raises(
        InputError, match=r"compare\.lora\.targets: found 'querry' \(did you mean \"query\"\?\), which names"
    ):
        lora_layers(model, LoraConfig(targets=["query", "querry"]), new)
    with pytest.raises(
        InputError, match=r"compare\.lora\.rank: found 9000, more entries than .* has; expected at most"
    ):
        lora_rank(lora_layers(model, LoraConfig(), new), LoraConfig(rank=9000, form="shira"), 0)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    class Norm(torch.nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(InputError, match="lora: found no linear layer in Norm"):
        insert_lora(Norm(), LoraConfig(), 0, [])


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
