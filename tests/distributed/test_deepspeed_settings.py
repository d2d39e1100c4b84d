"""What a DeepSpeed file may say beside a configuration, and what is refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from irdscale.config.schema import RunConfig
from irdscale.distributed.deepspeed import micro_batch, zero_settings, zero_stage
from irdscale.errors import InputError

ROOT = Path(__file__).parents[2]


def config(file: Path | str | None, dtype: str = "float32", **train: Any) -> RunConfig:
    sections = {"model": {"path": "m", "dtype": dtype}, "task": {"dataset": "glue/rte"}}
    return RunConfig.model_validate({**sections, "train": {"deepspeed": None if file is None else str(file), **train}})


def written(tmp_path: Path, settings: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs/deepspeed").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_files_suit_any_configuration(path: Path) -> None:
    assert zero_stage(config(path)) == int(path.stem[4])
    for dtype in ("float32", "bfloat16"):
        settings = zero_settings(config(path, dtype, batch_size=32, gradient_accumulation=4), world=8)
        assert settings is not None
        assert settings["train_batch_size"] == "auto"
        assert "bf16" not in settings, "trained numbers are float32"


def test_without_a_file_there_is_nothing_to_set() -> None:
    assert zero_settings(config(None)) is None
    assert zero_stage(config(None)) is None


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ("{", "float32", "ds.json: not JSON: "),
        ([1], "float32", "ds.json: found list; expected a JSON object"),
        ({"zero_optimization": 2}, "float32", "zero_optimization: found 2; expected a section"),
        ({"zero_optimization": {"stage": 4}}, "float32", "zero_optimization.stage: found 4; expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "float32", "zero_optimization.stage: found true; expected 0, 1, 2"),
        ({"fp16": {"enabled": True}}, "float32", "fp16.enabled: found true; expected false: set model.dtype=bfloat16"),
        ({"bf16": {"enabled": True}}, "float32", "bf16.enabled: found true; expected \"?'auto'"),
        ({}, "float64", "model.dtype: found 'float64' with train.deepspeed; expected 'float32' or 'bfloat16'"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "float32",
            "zero_optimization.offload_param.device: found \"nvme\"; expected 'cpu' or 'none'",
        ),
        (
            {"train_batch_size": 8},
            "float32",
            "train_batch_size: found 8; expected 'auto', or 16 as train.batch_size has",
        ),
        (
            {"train_micro_batch_size_per_gpu": 16},
            "float32",
            "found 16; expected 'auto', or 8 as train.batch_size / 2 r",
        ),
        ({"gradient_clipping": 0.5}, "float32", "gradient_clipping: found 0.5; expected 'auto', or 1.0 as train.max_"),
        ({"optimizer": {"type": "Lamb"}}, "float32", "optimizer: found .*; expected none, or AdamW with 'auto' values"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
            "float32",
            "optimizer: found .*; expected none, or AdamW with 'auto' values: see train.learning_rate",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "float32", "scheduler: found .*; expected none: see train.schedule"),
    ],
)
def test_what_contradicts_the_configuration_is_named(tmp_path: Path, settings: Any, dtype: str, message: str) -> None:
    path = written(tmp_path, settings)
    with pytest.raises(InputError, match=message) as error:
        zero_settings(config(path, dtype), world=2)
    assert "\n" not in str(error.value)


def test_usual_sections_are_taken(tmp_path: Path) -> None:
    usual = {
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 8,
        "steps_per_print": 10,
    }
    settings = zero_settings(config(written(tmp_path, usual), "bfloat16"), world=2)
    assert settings is not None
    assert {"optimizer", "bf16", "fp16"}.isdisjoint(settings)
    assert settings["steps_per_print"] == 10


def test_a_missing_file_and_a_missing_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"train.deepspeed: .*none.json: cannot read it: No such file"):
        zero_settings(config(tmp_path / "none.json"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="deepspeed is not installed; expected it: pip install"):
        zero_settings(config(written(tmp_path, {})))


def test_a_step_divides_among_ranks_and_passes() -> None:
    assert micro_batch(config(None, batch_size=16, gradient_accumulation=2), world=4) == 2
    with pytest.raises(
        InputError, match=r"train.batch_size: found 16; expected a multiple of 6: 3 rank\(s\) x train.g"
    ):
        micro_batch(config(None, batch_size=16, gradient_accumulation=2), world=3)


@pytest.mark.parametrize("world", [2, 3, 4, 8, 64, 100])
@pytest.mark.parametrize(("batch", "passes"), [(32, 8), (32, 1), (16, 2), (10, 5), (1, 1), (7, 7)])
def test_a_refusal_names_settings_that_divide(world: int, batch: int, passes: int) -> None:
    asked = {"batch_size": batch, "gradient_accumulation": passes}
    if batch % (world * passes) == 0:
        assert micro_batch(config(None, **asked), world) == batch // (world * passes)
        return
    with pytest.raises(InputError, match=r" would do$") as raised:
        micro_batch(config(None, **asked), world)
    named = dict(re.findall(r"train\.(batch_size|gradient_accumulation)=(\d+)", str(raised.value)))
    changed = asked | {key: int(value) for key, value in named.items()}
    # No more samples a pass than were asked for, for they must fit in memory.
    assert micro_batch(config(None, **changed), world) <= max(1, batch // passes)
    assert changed["batch_size"] == -(-batch // world) * world
