"""Comparisons that never ran, with figures that tests know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irdscale.config.schema import RunConfig
from irdscale.report.statistics import interval, paired
from irdscale.utils.files import write_json

ALL = {
    "ird": ("IRD", 520),
    "reverse": ("reverse IRD", 520),
    "fish_best": ("FISH, best of draws", 520),
    "fish": ("FISH", 520),
    "fish_small": ("FISH, fewest samples", 520),
    "top_samples": ("largest traces", 520),
    "bottom_samples": ("smallest traces", 520),
    "random_mask": ("random mask", 520),
    "magnitude_mask": ("magnitude mask", 520),
    "lora": ("LoRA", 8192),
    "bitfit": ("BitFit", 1900),
    "linear_probe": ("linear probe", 0),
    "full": ("full fine-tuning", 250000),
}
CONFIG = RunConfig.model_validate({"model": {"path": "models/tiny"}, "task": {"dataset": "glue/sst2"}})
OFFSETS = (0.004, -0.002, 0.0, 0.003, -0.005)


def method(name: str, test: Sequence[float | None], **more: Any) -> dict[str, Any]:
    """A method with these test scores by seed, without its difference; None is a seed that failed."""
    label, params = ALL[name]
    selection = [None if value is None else value + 0.01 for value in test]
    ended = [value for value in selection if value is not None]
    mean = sum(ended) / len(ended) if ended else None
    seeds = [
        {
            "seed": seed,
            "selection": chosen,
            "test": value,
            "samples": 64 if params == 520 else None,
            "pool": None,
            "params": None if value is None else params,
            "mask": "0123456789abcdef" if params == 520 else None,
            "evaluations": 10,
            "error": "TrainingError: the loss is nan <b>" if value is None else None,
        }
        for seed, (value, chosen) in enumerate(zip(test, selection, strict=True))
    ]
    return {
        "name": name,
        "label": label,
        "what": f"what {label} is",
        "learning_rate": 0.003 if ended else None,
        "grid": [
            {"learning_rate": 0.001, "selection": mean and mean - 0.02},
            {"learning_rate": 0.003, "selection": mean},
            {"learning_rate": 0.01, "selection": mean and mean - 0.01},
        ],
        "evaluations": 10.0,
        "fine_tunings": 8.4,
        "params": float(params) if ended else None,
        "seeds": seeds,
        "test": interval(test),
        "selection": interval(selection),
        "test_error": None,
        "difference": None,
        **more,
    }


def study(
    tests: Mapping[str, Sequence[float | None]],
    lower_is_better: bool = False,
    reference: str = "ird",
    changes: Mapping[str, dict[str, Any]] | None = None,
    name: str = "glue/sst2",
) -> dict[str, Any]:
    """compare.json of these test scores: method -> one a seed; `changes` are keys of single methods."""
    methods = [method(key, values, **(changes or {}).get(key, {})) for key, values in tests.items()]
    ours = dict(enumerate(tests[reference]))
    for entry in methods:
        if entry["name"] != reference:
            entry["difference"] = paired(ours, dict(enumerate(tests[entry["name"]])), lower_is_better)
    return {
        "task": {
            "name": name,
            "kind": "sequence-classification",
            "metric": "loss" if lower_is_better else "accuracy",
            "lower_is_better": lower_is_better,
            "num_labels": 2,
            "train": 8000,
            "selection": 436,
            "test": 437,
            "origin": {"train": "train", "selection": "half of validation", "test": "half of validation"},
            "pool": None,
        },
        "model": {"path": "models/tiny", "parameters": 5000, "head": 18, "scored": 480, "scored_by": "all"},
        "reference": reference,
        "seeds": list(range(len(tests[reference]))),
        "learning_rates": [0.001, 0.003, 0.01],
        "methods": methods,
        "warnings": [],
        "base": None,
        "fewest": None,
        "evaluations": 240,
        "seconds": {"masks": 3.0, "train": 140.0, "test": 9.0, "total": 152.0},
        "config": CONFIG.model_dump(mode="json"),
        "versions": {"irdscale": "0.1.0", "torch": "2.13.0"},
    }


def around(mean: float, seeds: int = 5, turn: int = 0) -> list[float]:
    """So many scores with a little spread that depends on `turn`."""
    return [mean + OFFSETS[(seed + turn) % len(OFFSETS)] for seed in range(seeds)]


def everything() -> dict[str, Any]:
    """A study of all methods, each a little worse than the one before it."""
    return study({name: around(0.72 - 0.006 * place, turn=place) for place, name in enumerate(ALL)})


def write_study(folder: Path, compared: dict[str, Any]) -> Path:
    write_json(folder / "compare.json", compared)
    return folder
