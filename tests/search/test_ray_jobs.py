"""What a rank of a trial reports while it trains, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from irdscale.config.loader import load_config
from irdscale.search.candidates import Candidate
from irdscale.search.ird import Pair
from irdscale.search.ray_jobs import evaluate_candidate
from tests.search.toy import write_config


class Client:
    """What stands for the connection to the supervisor."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def say(self, now: bool = False, **facts: Any) -> None:
        self.said.append(facts)

    def pausing(self) -> bool:
        return False


@pytest.mark.parametrize("report_to", [[], ["tensorboard"]])
def test_a_trial_says_its_loss_and_writes_its_metrics(report_to: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    config = load_config(write_config(tmp_path), ["train.steps=3", "train.save_minutes=0"])
    config = config.model_copy(update={"train": config.train.model_copy(update={"report_to": report_to})})
    client, probe = Client(), Candidate(None, Pair(0, 0), 0, 1, "ird")
    record = evaluate_candidate(config, tmp_path, probe, client)  # type: ignore[arg-type]
    assert record is not None
    assert record["status"] == "ok", record
    (file,) = tmp_path.glob("trainings/*/metrics.jsonl")
    assert file.parent.name == "round1-0samples-0parameters-seed0"
    losses = [json.loads(line)["loss"] for line in file.read_text().splitlines()]
    told = [facts["loss"] for facts in client.said if "loss" in facts]
    assert len(told) == len(losses) == 3
    assert told[0] == pytest.approx(losses[0])
    assert min(losses) < told[2] < max(losses)
    events = [path.read_bytes() for path in (tmp_path / "tensorboard" / file.parent.name).iterdir()]
    # The integration of transformers draws the losses, if asked to; this package draws the last metric in any case.
    tags = {tag: sum(tag in data for data in events) for tag in (b"train/loss", b"learning_rate", b"selection")}
    assert tags == {b"train/loss": len(report_to), b"learning_rate": 1, b"selection": 1}
