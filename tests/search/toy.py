"""A search that takes seconds: a tiny random BERT tells good films from bad ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from irdscale.search.ledger import Ledger, read_ledger
from tests.helpers import tiny_model

WORDS = {0: ["bad", "not", "said"], 1: ["good", "film", "is"]}
FILLER = ["the", "a", "of", "to", "man", "dog", "he", "she", "was"]


def write_data(folder: Path, counts: dict[str, int]) -> Path:
    """JSONL files of texts in which a few words tell the label."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for split, count in counts.items():
        lines = []
        for i in range(count):
            label = i % 2
            words = generator.choices(FILLER, k=generator.randint(2, 8)) + generator.choices(WORDS[label], k=2)
            generator.shuffle(words)
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_config(folder: Path, **changes: Any) -> Path:
    """A configuration of a complete toy search in `folder`, with its model and data; `section__key` changes it."""
    if not (folder / "model").exists():
        # The usual initial range leaves so small a model without a signal.
        tiny_model("bert", folder / "model", initializer_range=0.3)
        write_data(folder / "data", {"train": 64, "validation": 32, "test": 32})
    config: dict[str, Any] = {
        "model": {"path": "./model"},
        "task": {
            "dataset": "./data",
            "kind": "sequence-classification",
            "columns": {"text": ["text"], "label": "label"},
            "metric": "accuracy",
            "max_length": 32,
        },
        "fisher": {"samples": 16, "batch_size": 4},
        "search": {"ratio": 0.05, "min_ratio": 0.01, "min_samples": 4, "max_rounds": 3, "seeds": [0, 1]},
        "train": {"steps": 24, "batch_size": 8, "learning_rate": 0.003},
        "output": str(folder / "out"),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def essence(result: dict[str, Any]) -> dict[str, Any]:
    """What a search found, without times, places and the number of threads that it was found with."""
    kept = ("best", "pareto", "path", "stop", "evaluations", "reused", "sample_gradients", "training_steps")
    baseline = {n: {k: v for k, v in b.items() if k != "seconds"} for n, b in result["baseline"].items()}
    return {"baseline": baseline, **{name: result[name] for name in kept}}


def finished(output: Path) -> dict[str, float]:
    """Key -> metric of every evaluation that ended well; reading it refuses a key that is there twice."""
    return {r["key"]: r["metric"] for r in read_ledger(output / "ledger.jsonl") if r["status"] == "ok"}


def killed_after(count: int, append: Any) -> Any:
    """`Ledger.append` for a run that is interrupted when it has so many records more."""
    left = count

    def counting(self: Ledger, record: dict[str, Any]) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        append(self, record)

    return counting
