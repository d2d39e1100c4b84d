"""The checks of launch/gpu_check.sh on the CPU: they pass, and fail where something is broken; and its shell script."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from irdscale.bench import gpu_exact
from irdscale.bench.gpu_exact import DTYPES, FAMILIES, LIMITS, Check
from irdscale.bench.timing import figure
from irdscale.cli import command_line, gpu_check
from irdscale.config.loader import load_config
from irdscale.distributed.ranks import end_rank
from irdscale.search.ledger import FIELDS
from tests.spawned import run_ranks

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
both = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@both
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_exact(family: str, dtype: torch.dtype) -> None:
    assert gpu_exact.diagonal_error(family, dtype, CPU) <= LIMITS[dtype].diagonal
    assert gpu_exact.steps_error(family, dtype, CPU) <= LIMITS[dtype].deltas


def test_bfloat16_is_tested_and_not_float32() -> None:
    """What rounds less would be closer by a hundred times."""
    assert gpu_exact.diagonal_error("llama", torch.bfloat16, CPU) > 100 * LIMITS[torch.float32].diagonal


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.01), (torch.bfloat16, 1.3)])
@pytest.mark.parametrize("name", ["", "model.norm.weight"])
def test_wrong_squares_are_found(monkeypatch: pytest.MonkeyPatch, dtype: Any, factor: float, name: str) -> None:
    def scaled(*arguments: Any, **options: Any) -> Any:
        found = accumulate(*arguments, **options)
        return replace(found, diagonal={n: d * (factor if name in n else 1) for n, d in found.diagonal.items()})

    accumulate = gpu_exact.accumulate_fisher
    monkeypatch.setattr(gpu_exact, "accumulate_fisher", scaled)
    assert not gpu_exact.diagonal_error("llama", dtype, CPU) <= LIMITS[dtype].diagonal


def test_no_number_is_no_small_error() -> None:
    found = {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(2)}
    expected = {"a": torch.ones(2).double(), "b": torch.ones(2).double()}
    for order in (["a", "b"], ["b", "a"]):
        for norm in (False, True):
            error = gpu_exact.largest_error(found, {n: expected[n] for n in order}, 0.0, norm)
            assert not Check("", error, 1.0, 0.0).ok


def test_a_training_that_leaves_the_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(model: Any, mask: Any, **options: Any) -> Any:
        sparse = sparsify(model, mask, **options)
        weight = dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"].data.view(-1)
        chosen = set(mask.indices["model.layers.0.mlp.up_proj.weight"].tolist())
        weight[min(set(range(len(weight))) - chosen)] += 1e-6
        return sparse

    sparsify = gpu_exact.sparsify
    monkeypatch.setattr(gpu_exact, "sparsify", leaking)
    check = gpu_exact.checked("steps", 1.0, lambda: gpu_exact.steps_error("llama", torch.float32, CPU))
    assert not check.ok
    assert check.problem == ("AssertionError: model.layers.0.mlp.up_proj.weight: entries outside the mask have moved")


@both
def test_gradients_of_other_entries_are_found(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    from irdscale.sparse.products import Product

    entries = Product.entries
    monkeypatch.setattr(Product, "entries", lambda *arguments: entries(*arguments).roll(1))
    assert gpu_exact.steps_error("llama", dtype, CPU) > LIMITS[dtype].deltas


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_exact, "TUNING", short_tuning())


def short_tuning() -> tuple[str, ...]:
    """Two steps of the quickstart's model, on few samples."""
    return (*gpu_exact.TUNING, "train.steps=2", "task.limit.train=300", "task.max_length=32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fine_tune would take the GPU")
@pytest.mark.usefixtures("_short")
def test_fine_tune_is_exact_and_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_exact.tuned_error() <= gpu_exact.TUNED_LIMIT
    tune = gpu_exact.fine_tune

    def leaking(model: Any, *rest: Any) -> None:
        tune(model, *rest)
        model.get_input_embeddings().weight.data[0, 0] += 1e-6

    monkeypatch.setattr(gpu_exact, "fine_tune", leaking)
    with pytest.raises(AssertionError, match="entries outside the mask have moved"):
        gpu_exact.tuned_error()


def ranks(rank: int, world: int, folder: str) -> None:
    """Run the checks of all ranks; each writes their lines."""
    torch.set_num_threads(1)
    gpu_exact.TUNING = short_tuning()
    gpu_check.zero_row = lambda: {"what": "steps a second"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = [f"row {c['what']}" if isinstance(c, dict) else c.line() for c in gpu_check.run_rank_checks(CPU)]
    (Path(folder) / f"lines-{rank}").write_text("\n".join(found))
    end_rank()


@pytest.mark.skipif(torch.cuda.is_available(), reason="fine_tune would take the GPU")
@pytest.mark.usefixtures("ranks_of_deepspeed")
def test_checks_of_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OMP_NUM_THREADS": "1", "LOCAL_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    run_ranks(ranks, 2, str(tmp_path))
    lines = [(tmp_path / f"lines-{rank}").read_text().splitlines() for rank in (0, 1)]
    names = ["Fisher diagonal, replicated", "Fisher diagonal, sharded", "fine_tune, DDP"]
    if importlib.util.find_spec("deepspeed") is not None:
        names += ["fine_tune, ZeRO-3", "steps a second"]
    assert [len(own) for own in lines] == [len(names)] * 2
    for line, name in zip(lines[0], names, strict=True):
        assert name in line
        assert line.startswith(("ok", "row"))


@pytest.mark.usefixtures("_short")
def test_steps_a_second_are_of_those_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def tuned(model: Any, task: Any, config: Any, seed: int, control: Any) -> None:
        asked.append(config.train)
        control.advance(0)
        for _ in range(3):
            control.advance(1)

    ends = iter([0.0, 10.0, 11.0, 11.5])
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(perf_counter=lambda: next(ends)))
    monkeypatch.setattr("irdscale.training.trainer.fine_tune", tuned)
    # The model is not in partitions here.
    monkeypatch.setattr("irdscale.training.trainable.sparse_model", lambda *_: None)
    monkeypatch.setattr(gpu_check, "WARM_UP", 1)
    monkeypatch.setattr(gpu_check, "MEASURED", 2)
    row = gpu_check.zero_row()
    assert (row["ratio"], row["bar"], row["met"]) == (1.333, ">= 30.0", False)
    assert (asked[0].steps, asked[0].batch_size, Path(asked[0].deepspeed).name) == (3, 16, "zero3.json")


def test_a_check_that_raises_has_failed() -> None:
    def broken() -> float:
        raise ValueError("two\nlines")

    check = gpu_exact.checked("a check", 1.0, broken)
    assert check.line().startswith("FAILED")
    assert check.line().endswith(" s  a check: ValueError: two lines")


def test_a_failed_check_counts_and_a_missed_bar_does_not(capsys: Any) -> None:
    missed = figure("train", "steps a second", "260K", 128, 3.0, at_least=30.0)
    good, bad = Check("good", 0.1, 1.0, 2.0), Check("bad", float("nan"), 1.0, 2.0)
    assert gpu_check.tell(iter([good, missed])) == 0
    assert gpu_check.tell(iter([bad, good])) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok        2.0 s  good: 1.0e-01, at most 1e+00"
    assert lines[1].startswith("MISSED")
    assert lines[1].endswith("steps a second, 260K x 128 tokens: 3 (3 to 3, bar >= 30.0)")
    assert lines[2].startswith("FAILED    2.0 s  bad: nan")


def test_search_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    metrics = {"best": 2.0, "base": 4.0}

    def run(arguments: list[str]) -> int:
        verb, config, output = arguments
        assert (verb, Path(config).name) == ("search", "quickstart_llm.yaml")
        folder = Path(output.removeprefix("output="))
        folder.mkdir(exist_ok=True)
        result = {"best": {"metric": metrics["best"]}, "baseline": {"base": {"metric": metrics["base"]}}}
        (folder / "result.json").write_text(json.dumps(result))
        ends = {3.0: "ok", 0.5: "ok", 0.6: "ok", 9.0: "failed"}
        records = [dict.fromkeys(FIELDS) | {"seconds": s, "status": end, "key": str(s)} for s, end in ends.items()]
        (folder / "ledger.jsonl").write_text("".join("\n" + json.dumps(record) for record in records))
        return 0

    def small(path: Any, overrides: list[str]) -> Any:
        return load_config(path, [*overrides, "fisher.samples=32", "task.limit.train=300", "task.max_length=32"])

    monkeypatch.setattr(command_line, "run", run)
    monkeypatch.setattr("irdscale.config.loader.load_config", small)
    check, evaluation, masks = gpu_check.run_search_check(tmp_path)
    assert check.ok  # type: ignore[union-attr]
    assert (evaluation["ratio"], evaluation["met"]) == (0.6, True)  # type: ignore[index]
    assert masks["what"] == "masks of 32 samples, after compiling, s"  # type: ignore[index]
    metrics["best"] = 4.1
    assert not next(gpu_check.run_search_check(tmp_path)).ok  # type: ignore[union-attr]
    monkeypatch.setattr(command_line, "run", lambda _: 1)
    assert "exit code 1" in next(gpu_check.run_search_check(tmp_path)).line()  # type: ignore[union-attr]


def test_card(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["card"]) == 2
    assert capsys.readouterr().err == "gpu_check: found no CUDA device; expected one\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA X")
    monkeypatch.setenv("PATH", "")
    assert gpu_check.main(["card"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("2 x NVIDIA X, driver unknown, Python 3.")
    assert all(word in line for word in ("torch ", "triton ", "transformers ", "irdscale 0."))
    assert line.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["cards"], ["search"], ["exact", "x"]])
def test_parts_that_there_are_not(arguments: list[str], capsys: Any) -> None:
    assert gpu_check.main(arguments) == 2
    assert "expected one of card, exact, search, ranks" in capsys.readouterr().err


# The script, with a Python that notes what is asked of it.


def call(folder: Path, python: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    root = folder / "check out"
    shutil.copytree(ROOT / "launch", root / "launch", dirs_exist_ok=True)
    for part in ("fisher", "sparse"):
        (root / "tests" / part).mkdir(parents=True, exist_ok=True)
        (root / "tests" / part / "kernel_checks.py").touch()
    calls, program = folder / "calls", folder / "python"
    calls.unlink(missing_ok=True)
    program.write_text(f'#!/usr/bin/env bash\necho "$TRITON_INTERPRET $HF_HUB_OFFLINE $*" >>"{calls}"\n{python}\n')
    program.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(program)}
    command = ["bash", str(root / "launch" / "gpu_check.sh")]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60)
    return done, calls.read_text().splitlines()


def test_the_script_runs_all_in_order(tmp_path: Path) -> None:
    done, calls = call(tmp_path, '[[ "$*" != *card ]] || echo "2 x NVIDIA X, driver 1"')
    assert done.returncode == 0, done.stderr
    asked = [line.partition("1 ")[2] for line in calls if " -c " not in line]
    kernels = "-m pytest -q -p no:cacheprovider tests/fisher/kernel_checks.py tests/sparse/kernel_checks.py"
    assert asked[:3] == ["-m irdscale.cli.gpu_check card", kernels, "-m irdscale.cli.gpu_check exact"]
    assert asked[3].startswith("-m irdscale.cli.gpu_check search ")
    ranks = "-m torch.distributed.run --standalone --nproc-per-node 2 -m irdscale.cli.gpu_check ranks"
    assert asked[4:] == [ranks, "-m irdscale bench gpu"]
    assert [line.startswith("0 1 ") for line in calls if "pytest -q" in line] == [True]
    assert not Path(asked[3].split()[-1]).exists()
    lines = done.stdout.splitlines()
    assert lines[0] == "2 x NVIDIA X, driver 1"
    assert re.fullmatch(r"met    \d s  checks of the kernels, asked <= 60 s", lines[2])
    assert lines[-1].startswith("gpu_check.sh: all checks passed in ")


def test_the_script_goes_on_after_a_failure_and_says_so(tmp_path: Path) -> None:
    python = 'case "$*" in *card) echo "1 x X" ;; *exact) exit 1 ;; *ranks) exit 124 ;; esac'
    done, calls = call(tmp_path, python)
    assert done.returncode == 1
    assert calls[-1].endswith("-m irdscale bench gpu")
    assert "exactness (exit code 1), ranks (exit code 124)" in done.stdout.splitlines()[-1]
    assert sum(line.startswith("FAILED") for line in done.stdout.splitlines()) == 2


def test_the_script_refuses_before_anything_slow(tmp_path: Path) -> None:
    refusal = "gpu_check: found no CUDA device; expected one"
    done, calls = call(tmp_path, f'[[ "$*" != *card ]] || {{ echo "{refusal}" >&2; exit 2; }}')
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{refusal}\n")
    assert len(calls) == 2
    done, calls = call(tmp_path, "exit 1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "found no torch and irdscale in " in done.stderr
    assert len(calls) == 1


def test_the_script_works_without_the_tests(tmp_path: Path) -> None:
    done, calls = call(tmp_path, 'case "$*" in *card) echo "1 x X" ;; *"import pytest") exit 1 ;; esac')
    assert done.returncode == 0
    assert "kernels: left out" in done.stdout
    assert not any("kernel_checks" in line for line in calls)
