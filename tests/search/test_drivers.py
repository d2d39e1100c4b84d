"""Each sample's part of a mask's Fisher information, against one backward pass a sample, and the report that tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from irdscale import Mask, accumulate_fisher, top_k
from irdscale.config.loader import load_config
from irdscale.errors import InputError
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.models.build import build_model
from irdscale.report import write_report
from irdscale.search.drivers import masked_traces, write_drivers
from irdscale.search.run import run_search
from irdscale.tasks import load_task
from irdscale.utils.files import write_json
from tests.fisher.oracle import loss_of
from tests.search.toy import write_config
from tests.tiny_models import collate, samples, tiny


def by_hand(model: Any, batches: list[Any], mask: Mask) -> list[float]:
    """One backward pass for each sample, its squares summed over the mask's entries."""
    found = []
    for batch in batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        parameters = dict(model.named_parameters())
        gradients = {name: parameters[name].grad.reshape(-1)[index.long()] for name, index in mask.indices.items()}
        found.append(sum(float(g.double().square().sum()) for g in gradients.values()))
    model.zero_grad()
    return found


# DeBERTa takes one sample per backward; GPT-2's embedding is tied to its head.
@pytest.mark.parametrize(("family", "head"), [("bert", "classification"), ("deberta", "regression"), ("gpt2", "lm")])
def test_masked_traces_equal_brute_force(family: str, head: str) -> None:
    model, rows = tiny(family, head), samples(head)
    mask = top_k(accumulate_fisher(model, rows, collate_fn=collate, dtype=torch.float64), 150)
    assert 1 < len(mask.indices) < len(mask.shapes)
    gradients = SampleGradients(model, rows, collate, scored_parameters(model), batch_size=3)
    order = [5, 0, 3, 7, 1]
    found = masked_traces(gradients, order, mask, dtype=torch.float64)
    expected = by_hand(model, [collate([rows[i]]) for i in order], mask)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_mask_of_another_model_is_refused() -> None:
    model, rows = tiny("bert"), samples()
    gradients = SampleGradients(model, rows, collate, scored_parameters(model, r"\.layer\."))
    mask = Mask({"classifier.bias": torch.tensor([1])}, {"classifier.bias": (3,)})
    with pytest.raises(InputError, match=r"mask: classifier.bias: found shape None in the model; expected \(3,\)"):
        masked_traces(gradients, [0], mask)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short search."""
    overrides = ["search.max_rounds=1", "search.seeds=[0]", "train.steps=4"]
    config = load_config(write_config(tmp_path_factory.mktemp("drivers")), overrides)
    run_search(config, progress=False)
    return Path(config.output)


def test_a_report_with_samples(output: Path) -> None:
    write_report(output)
    assert "hold half" not in (output / "report.md").read_text()
    write_report(output, samples=True)
    result = json.loads((output / "result.json").read_text())
    measured = json.loads((output / "fisher/drivers.json").read_text())
    traces = json.loads((output / "fisher/traces.json").read_text())
    kept = traces["order"][: result["best"]["samples"]]
    assert measured["place"] == kept
    config = load_config(output / "config.yaml")
    task = load_task(config)
    model = build_model(config, task, 0)[0]
    rows = {row["row"]: row for row in task.train}
    mask = Mask.load(output / result["best"]["mask"])
    expected = by_hand(model, [task.collate([rows[traces["row"][i]]]) for i in kept], mask)
    assert measured["share"] == pytest.approx([e / sum(expected) for e in expected], rel=1e-4)
    assert sum(measured["share"]) == pytest.approx(1)
    assert f"of the {len(kept)} samples behind the winner's mask hold half" in (output / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "row", "message"),
    [
        ({"score": "random"}, None, "fisher.score: found random, a score that reads no samples; expected fisher"),
        ({"score": "activation"}, None, "found activation, a score that takes no gradients; expected fisher"),
        ({"scores": "fisher"}, None, r"result.json: fisher.scores: unknown key"),
        ({}, 99, "found other samples than the search; expected the same"),
    ],
)
def test_what_cannot_be_measured(
    output: Path, tmp_path: Path, changes: dict[str, Any], row: int | None, message: str
) -> None:
    result = json.loads((output / "result.json").read_text())
    result["config"]["fisher"] |= changes
    traces = json.loads((output / "fisher/traces.json").read_text())
    write_json(tmp_path / "fisher/traces.json", traces | {"row": [row, *traces["row"][1:]] if row else traces["row"]})
    (tmp_path / "masks").symlink_to(output / "masks")
    with pytest.raises(InputError, match=message) as error:
        write_drivers(tmp_path, result, progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "fisher/drivers.json").exists()
