"""A whole search of a language model: the smallest perplexity wins, and the model as it came is what it must beat."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest

from irdscale.config.loader import load_config
from irdscale.models.build import build_model
from irdscale.report import write_report
from irdscale.search.ledger import read_ledger
from irdscale.search.run import run_search
from irdscale.tasks import load_task
from irdscale.training.evaluate import evaluate_model
from irdscale.training.one_mask import run_evaluate, run_export, run_train

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart_llm.yaml"
FEW = [
    "task.limit={train: 200, selection: 40, test: 40}",
    "task.max_length=32",
    "fisher={samples: 16, batch_size: 8, token_reduction: sum}",
    "search={ratio: 0.02, min_samples: 8, max_rounds: 1, seeds: [0, 1]}",
    "train={steps: 8, batch_size: 8, learning_rate: 0.02}",
]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    output = tmp_path_factory.mktemp("language") / "out"
    config = load_config(QUICKSTART, [*FEW, f"output={output}"])
    return config, run_search(config, progress=False)


def test_the_smallest_perplexity_wins(searched: tuple[Any, dict[str, Any]]) -> None:
    config, result = searched
    output = Path(config.output)
    assert (result["task"]["metric"], result["task"]["lower_is_better"]) == ("perplexity", True)
    by_mask: dict[str, list[float]] = {}
    for record in read_ledger(output / "ledger.jsonl"):
        if record["round"] is not None:
            by_mask.setdefault(record["mask"], []).append(record["metric"])
    means = [sum(metrics) / 2 for metrics in by_mask.values()]
    assert len(means) == 4
    assert result["best"]["metric"] == pytest.approx(min(means))
    assert [entry["metric"] for entry in result["pareto"]] == sorted(
        (entry["metric"] for entry in result["pareto"]), reverse=result["pareto"][0]["metric"] > min(means)
    )
    kept = min(result["best"]["seeds"], key=lambda seed: seed["metric"])
    found = run_evaluate(config, str(output / "adapter"), progress=False)
    assert found["test"]["perplexity"] == pytest.approx(kept["test_metric"], rel=1e-6)
    assert found["selection"]["perplexity"] == pytest.approx(kept["metric"], rel=1e-6)


def test_what_it_is_compared_with(searched: tuple[Any, dict[str, Any]]) -> None:
    config, result = searched
    assert set(result["baseline"]) == {"fish_random", "base"}
    task = load_task(config)
    base = evaluate_model(build_model(config, task, 0)[0], task, task.test, 16)
    assert result["baseline"]["base"]["test_metric"] == pytest.approx(base["perplexity"], rel=1e-6)
    assert result["best"]["test_metric"] < 0.9 * base["perplexity"]
    assert result["model"]["scored_by"] == "all linear layers of the decoder blocks"
    assert result["model"]["head"] == 0


def test_the_report_says_so(searched: tuple[Any, dict[str, Any]]) -> None:
    config, _ = searched
    write_report(Path(config.output))
    for name in ("report.md", "report.html"):
        text = (Path(config.output) / name).read_text()
        assert "That is better than the base model for every seed" in text
        assert "It chose from all linear layers of the decoder blocks." in text
        assert f"AutoModelForCausalLM.from_pretrained('{config.model.path}', dtype='float32')" in html.unescape(text)
    assert "smaller is better" in (Path(config.output) / "report.md").read_text()


def test_train_and_export(tmp_path: Path) -> None:
    packing = ["task.packing=true", "train.gradient_checkpointing=true", f"output={tmp_path / 'out'}"]
    packed = load_config(QUICKSTART, [*FEW, *packing])
    found = run_train(packed, progress=False)
    merged = tmp_path / "merged"
    run_export(packed, found["adapter"], str(merged))
    again = packed.model_copy(update={"model": packed.model.model_copy(update={"path": str(merged)})})
    task = load_task(again)
    metrics = evaluate_model(build_model(again, task, 0)[0], task, task.test, 16)
    assert metrics["perplexity"] == pytest.approx(found["test"]["perplexity"], rel=1e-5)
