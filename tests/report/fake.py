"""The output folder of a search that never ran, with figures that tests know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from irdscale.masks.mask import Mask
from irdscale.search.ird import Pair
from irdscale.search.ledger import Ledger
from irdscale.utils.files import write_json

SHAPES = {
    "bert.embeddings.word_embeddings.weight": (50, 8),
    "bert.encoder.layer.0.attention.self.query.weight": (8, 8),
    "bert.encoder.layer.0.attention.self.query.bias": (8,),
    "bert.encoder.layer.1.output.LayerNorm.weight": (8,),
}
START, MINIMUM = Pair(32, 40), Pair(16, 20)
# Round 1 goes on with (32, 20); (16, 20) has the mask of (32, 20), so its metrics are shared.
MEANS = {Pair(32, 40): 0.70, Pair(16, 40): 0.72, Pair(32, 20): 0.75, Pair(16, 20): 0.75}


def mask_of(pair: Pair) -> Mask:
    word = torch.arange(pair.params - 2 - (pair.samples == 16 and pair.params == 40), dtype=torch.int32)
    indices = {"bert.embeddings.word_embeddings.weight": word}
    indices["bert.encoder.layer.0.attention.self.query.weight"] = torch.tensor([3, 9], dtype=torch.int32)
    return Mask(indices, SHAPES)


def seeds_of(mean: float, seeds: list[int], spread: float = 0.01) -> list[dict[str, Any]]:
    offsets = [spread * (2 * i - len(seeds) + 1) for i in range(len(seeds))]
    return [
        {"seed": s, "metric": mean + o, "test_metric": mean + o - 0.02} for s, o in zip(seeds, offsets, strict=True)
    ]


def entry(mean: float, seeds: list[int], **more: Any) -> dict[str, Any]:
    return {
        "metric": mean,
        "test_metric": mean - 0.02,
        "test_error": None,
        "seeds": seeds_of(mean, seeds),
        "error": None,
        **more,
    }


def write_output(
    folder: Path,
    fish: float = 0.71,
    probe: float | None = 0.60,
    seeds: tuple[int, ...] = (0, 1),
    same_mask: bool = False,
    fail: Pair | None = None,
    name: str = "glue/sst2",
) -> Path:
    """Write a finished search whose winner is (32, 20) with a mean of 0.75 (0.73 on test)."""
    numbers = list(seeds)
    masks = {pair: mask_of(pair) for pair in MEANS}
    for mask in masks.values():
        mask.save(folder / "masks" / mask.hash)
    with Ledger(folder / "ledger.jsonl") as ledger:
        for pair, mean in MEANS.items():
            if pair == Pair(16, 20):
                continue
            for one in seeds_of(mean, numbers):
                broken = pair == fail and one["seed"] == numbers[-1]
                ledger.append(
                    {
                        "round": 0 if pair == START else 1,
                        "samples": pair.samples,
                        "params": pair.params,
                        "seed": one["seed"],
                        "direction": "ird",
                        "mask": masks[pair].hash,
                        "metric": None if broken else one["metric"],
                        "status": "failed" if broken else "ok",
                        "error": "RunError: the loss is nan <b>" if broken else None,
                        "seconds": 2.0,
                        "key": f"{pair}-{one['seed']}",
                    }
                )
    best = Pair(32, 20)
    baselines = {
        "fish_random": entry(
            0.75 if same_mask else fish,
            numbers,
            samples=32,
            params=20,
            mask=f"masks/{masks[best].hash}",
            same_mask_as_best=same_mask,
            sample_gradients=32,
            seconds=1.0,
        )
    }
    if probe is not None:
        baselines["linear_probe"] = entry(probe, numbers, params=0)
    write_json(
        folder / "fisher/masks.json",
        {
            "start": [32, 40],
            "minimum": [16, 20],
            "masks": [[p.samples, p.params, mask.hash] for p, mask in masks.items()],
            "facts": {},
            "made_by": "",
        },
    )
    traces = [float(i + 1) for i in range(32)]
    write_json(
        folder / "fisher/traces.json",
        {
            "row": list(range(32)),
            "trace": traces,
            "length": [5 + i % 7 for i in range(32)],
            "loss": [1.0] * 32,
            "label": [i % 2 for i in range(32)],
            "order": list(range(31, -1, -1)),
        },
    )
    write_json(
        folder / "result.json",
        {
            "best": entry(0.75, numbers, samples=32, params=20, mask=f"masks/{masks[best].hash}", adapter="adapter"),
            "pareto": [
                {"samples": 16, "params": 40, "metric": 0.72, "mask": ""},
                {"samples": 32, "params": 20, "metric": 0.75, "mask": ""},
            ],
            "path": [
                {"round": 0, "samples": 32, "params": 40, "metric": 0.70},
                {"round": 1, "samples": 32, "params": 20, "metric": 0.75},
            ],
            "stop": "max_rounds = 1 reached",
            "baseline": baselines,
            "evaluations": 6,
            "reused": 2,
            "sample_gradients": 64,
            "baseline_sample_gradients": 32,
            "training_steps": 1234,
            "seconds": {"fisher": 3.0, "train": 40.0, "baseline": 9.0, "test": 2.0, "total": 54.0},
            "warnings": [],
            "task": {
                "name": name,
                "kind": "sequence-classification",
                "metric": "accuracy",
                "lower_is_better": False,
                "num_labels": 2,
                "train": 8000,
                "selection": 436,
                "test": 437,
                "origin": {"train": "train", "selection": "half of validation", "test": "half of validation"},
                "pool": None,
            },
            "model": {"path": "models/tiny", "parameters": 5000, "scored": 480, "head": 18, "scored_by": "all"},
            "direction": "ird",
            "config": {"search": {"seeds": numbers}},
            "versions": {"irdscale": "0.1.0", "torch": "2.13.0"},
        },
    )
    return folder
