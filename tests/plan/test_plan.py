"""`irdscale plan` and `run_plan`: what they give and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from irdscale.cli.command_line import run
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.plan import run_plan

ROOT = Path(__file__).parents[2]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
# 4 layers of 64 x (64 + 32 + 32 + 64) + 3 x 64 x 128, 9 norms of 64, and two tables of 512 x 64.
LAYERS, PARAMETERS = 4 * (12_288 + 24_576), 4 * (12_288 + 24_576) + 9 * 64 + 2 * 32_768


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"path": "./model", "dtype": "bfloat16"},
                "task": {"dataset": "someone/chats", "kind": "sft", "max_length": 32},
                "fisher": {"samples": 64, "batch_size": 2},
                "search": {"ratio": 0.01, "max_rounds": 2},
                "train": {"steps": 10, "batch_size": 8},
            }
        )
    )
    return path


def plan(path: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return run_plan(load_config(path, overrides), **options)


def test_numbers_of_a_small_model(config):
    found = plan(config)
    assert found["parameters"] == PARAMETERS
    assert found["k"] == round(0.01 * PARAMETERS)
    assert set(found["memory_gib"]) == {
        "weights",
        "activations",
        "fisher",
        "values_and_moments",
        "buffers",
        "total",
    }
    assert found["memory_gib"] == found["phases"][found["phase"]]
    assert found["phases"]["fisher"]["weights"] == round(2 * PARAMETERS / 2**30, 4)
    assert found["phases"]["fisher"]["fisher"] == round(4 * LAYERS / 2**30, 4)
    assert found["fits"] is True
    # The start, two rounds of three and the two it is compared with, by two seeds.
    assert found["evaluations"] == (1 + 6 + 2) * 2
    assert plan(config, "search.max_rounds=12")["evaluations"] == (1 + 3 * 6 + 2) * 2, (
        "an eighth of each is three halvings"
    )
    assert found["flops"]["candidate"] == 10 * found["flops"]["step"]
    assert found["traffic_gib"]["search"] == 0
    assert found["hours"]["train"] == found["hours"]["candidate"] > 0


def test_a_head_that_is_warmed_up_takes_steps_but_no_memory(config):
    task = "task={dataset: a, kind: regression, columns: {text: [a], label: b}, max_length: 32}"
    cold, warm = (plan(config, task, f"fisher.head_warmup={steps}", gpus_per_node=2) for steps in (0, 4))
    assert warm["phases"] == cold["phases"]
    # Before the pool's passes, and before those of the random samples.
    more = {key: warm[key]["search"] - cold[key]["search"] for key in ("flops", "hours")}
    assert more["flops"] == pytest.approx(2 * 4 * cold["flops"]["step"], rel=1e-3)
    assert more["hours"] == pytest.approx(2 * 4 / 10 * cold["hours"]["candidate"], rel=0.02)
    assert warm["hours"]["candidate"] == cold["hours"]["candidate"]
    assert warm["traffic_gib"]["search"] > cold["traffic_gib"]["search"]


def test_layouts_of_two_ranks(config):
    found = plan(config, "fisher.layout=sharded", gpus_per_node=2)
    assert len(found["layouts"]) == 10
    assert [layout["stage"] for layout in found["layouts"] if layout["configured"]] == ["ddp"]
    assert [layout["fisher"] for layout in found["layouts"] if layout["configured"]] == ["sharded"]


def test_tokens_and_samples_of_the_command_line(config):
    flops = [plan(config, tokens=tokens)["flops"]["step"] for tokens in (16, 32)]
    assert flops[1] > 2 * flops[0]
    longer = plan(config, "train.steps=null", "train.epochs=2", train_samples=80)
    assert longer["flops"]["candidate"] == pytest.approx(2 * plan(config)["flops"]["candidate"], rel=1e-5)
    limited = plan(config, "train.steps=null", "train.epochs=2", "task.limit={train: 80}")
    assert limited["flops"] == longer["flops"]


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["train.steps=null"], {}, r"train_samples: missing; expected the size of the train split"),
        ([], {"gpu": "h200"}, r'gpu: found \'h200\' \(did you mean "h200-141gb"\?\)'),
        ([], {"nodes": 0}, r"nodes: found 0; expected at least 1"),
        ([], {"gpus_per_node": 3}, r"train.batch_size: found 8; expected a multiple of 3"),
        ([], {"tokens": 257}, r"tokens: found 257; expected at most 256, the model's positions"),
        (["task.max_length=300"], {}, r"task.max_length: found 300; expected at most 256"),
        (["search.ratio=0.9"], {}, r"search.ratio: found 0.9, which gives \d+ of \d+ parameters; expected 1 to"),
        (["task.kind=null"], {}, r"task.kind: found none; expected a kind, because the data set is not in GLUE"),
        (["model.path=/nowhere/at/all"], {}, r"model.path: /nowhere/at/all: no such folder"),
        (
            ["search.runner=ray", "search.ray={ranks: 4}"],
            {},
            r"search.ray.ranks: found 4; expected at most 1, the GPUs",
        ),
        (["train.always_train=[nothing]"], {}, r"train.always_train: 'nothing' matches no parameter"),
    ],
)
def test_bad_input(config, overrides, options, message):
    with pytest.raises(InputError, match=message):
        plan(config, *overrides, **options)


def test_what_does_not_fit_is_told_what_would(tmp_path):
    """Llama 3.1 8B on an RTX 4090: not alone, but in partitions on some."""
    shipped = ROOT / "configs" / "llm" / "llama31_8b_gsm8k.yaml"
    config = load_config(shipped, [f"model.path={ROOT / 'tests' / 'llm' / 'llama31_8b'}", "train.batch_size=32"])
    found = run_plan(config, gpu="rtx4090-24gb")
    assert not found["fits"]
    assert found["advice"][0].startswith("Does not fit: ")
    here, fewest = found["advice"][1:3]
    assert "fisher.offload=true" in here
    assert "GiB of main memory per node" in here
    assert "train.deepspeed=configs/deepspeed/zero3.json" in fewest
    assert "fisher.layout=sharded" in fewest


def test_masks_of_each_layer_scatter_and_those_of_the_model_concentrate(config):
    """`layerwise` is the default of language models."""
    each, whole = (plan(config, *scope, tokens=256) for scope in ([], ["fisher.scope=global"]))
    assert each["hours"]["candidate"] == pytest.approx(1.41 / 1.007 * whole["hours"]["candidate"], rel=1e-3)
    assert each["hours"]["fisher"] == whole["hours"]["fisher"]
    assert each["flops"]["step"] > whole["flops"]["step"]
    assert each["phases"]["train"]["activations"] > whole["phases"]["train"]["activations"]


def test_layers_that_run_again_take_a_forward_pass_more(config):
    """Of a forward pass, its gradients and the mask's, which takes 1.41 times the two first."""
    once, again = (plan(config, f"train.gradient_checkpointing={value}") for value in ("false", "true"))
    forward = again["flops"]["step"] - once["flops"]["step"]
    seconds = 10 * forward / (0.29 * 989e12)
    assert again["hours"]["candidate"] - once["hours"]["candidate"] == pytest.approx(seconds / 3600, rel=0.01)


def test_candidates_of_ray_train_side_by_side(config):
    alone = plan(config, gpus_per_node=4)
    ray = plan(config, "search.runner=ray", gpus_per_node=4)
    assert ray["micro_batch"] == 4 * alone["micro_batch"] == 8
    assert ray["traffic_gib"]["candidate"] == 0


def test_command_prints_json_alone(config, capsys):
    assert run(["plan", str(config), "gpus_per_node=2", "gpu=a100-40gb", "search.ratio=0.02", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["k"] == round(0.02 * PARAMETERS)
    assert found["gpu"] == "a100-40gb"
    assert found["rates"] == {"device": "h100-80gb", "own": False}
    for key in ("parameters", "memory_gib", "traffic_gib", "flops", "hours", "fits", "advice"):
        assert key in found


def test_command_prints_tables(config, capsys):
    assert run(["plan", str(config), "gpus_per_node=2"]) == 0
    shown = capsys.readouterr().out
    for word in ("weights", "make masks", "zero3", "Fits:", "samples/s", "by shares of the peak measured on h100-80gb"):
        assert word in shown


def test_command_refuses_in_one_line(config, capsys):
    assert run(["plan", str(config), "gpus=2"]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_imports_neither_torch_nor_ray():
    code = "import irdscale.plan, irdscale.plan.advice, irdscale.plan.show, sys; "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_python_users_build_the_configuration():
    values = {
        "model": {"path": str(ROOT / "tests" / "llm" / "gemma3_1b"), "dtype": "bfloat16"},
        "task": {"dataset": "someone/texts", "kind": "causal-lm", "max_length": 64},
        "train": {"steps": 1},
    }
    assert run_plan(RunConfig.model_validate(values))["parameters"] == 999_885_952
