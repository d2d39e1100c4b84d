"""The checks of launch/gpu_check.sh besides the kernels: `python -m irdscale.cli.gpu_check`.

    card          GPUs and versions, in one line; exit code 2 without a GPU
    exact         Fisher diagonals and sparse training on the GPU against float64 on the CPU
    search DIR    a search of the quickstart's language model, and its speed
    ranks         under torchrun: sharded Fisher passes, DDP and ZeRO-3 against float64, and ZeRO-3's speed

Exit code 1: a check failed. A missed bar is marked, but does not fail.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from irdscale.bench.gpu_exact import Check

MASKS_BAR = 1.0
EVALUATION_BAR = 1.0
ZERO_BAR = 30.0
# Steps before the measurement, and measured steps.
WARM_UP, MEASURED = 10, 50
ZERO_FILE = Path(__file__).parents[2] / "configs" / "deepspeed" / "zero3.json"
WAYS = ("card", "exact", "search", "ranks")


def card() -> str:
    """The GPUs, the driver and the versions, in one line.

    Raises:
        InputError: there is no GPU.
    """
    import torch

    from irdscale.errors import InputError

    if not torch.cuda.is_available():
        raise InputError("found no CUDA device", "one", key="gpu_check")
    packages = ("irdscale", "triton", "transformers", "deepspeed", "peft")
    found = [f"{package} {_version(package)}" for package in packages]
    cards = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    torch_line = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    return ", ".join([cards, f"driver {_driver()}", f"Python {platform.python_version()}", torch_line, *found])


def _version(package: str) -> str:
    from irdscale import __version__

    try:
        # The installer has no version of a checkout on the path.
        return __version__ if package == "irdscale" else version(package)
    except PackageNotFoundError:
        return "missing"


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def run_search_check(folder: Path) -> Iterator[Check | dict[str, Any]]:
    """Check that a search improves the quickstart's language model, then measure its speed, in two rows.

    The masks are computed again in this process, with all kernels compiled.
    """
    from irdscale.bench.gpu_exact import CONFIG, checked
    from irdscale.bench.timing import figure
    from irdscale.config.loader import load_config
    from irdscale.search.ledger import read_ledger
    from irdscale.search.masks import search_masks
    from irdscale.tasks import load_task

    output = folder / "search"
    yield checked(
        "search configs/quickstart_llm.yaml, the winner's perplexity over the base's", 1.0, partial(_search, output)
    )
    found = partial(figure, "search", model="260K", tokens=128)
    seconds = [record["seconds"] for record in read_ledger(output / "ledger.jsonl") if record["status"] == "ok"]
    if seconds:
        what = f"an evaluation of {load_config(CONFIG, []).train.steps} steps, s"
        spread = (min(seconds), max(seconds))
        yield found(what, value=statistics.median(seconds), spread=spread, limit=EVALUATION_BAR)
    again = load_config(CONFIG, [f"output={folder / 'again'}"])
    took = search_masks(again, load_task(again), folder / "again", progress=False).facts["seconds"]
    yield found(f"masks of {again.fisher.samples} samples, after compiling, s", value=took, limit=MASKS_BAR)


def _search(output: Path) -> float:
    """The winner's perplexity over that of the base model."""
    from irdscale.bench.gpu_exact import CONFIG
    from irdscale.cli import command_line

    code = command_line.run(["search", str(CONFIG), f"output={output}"])
    assert code == 0, f"exit code {code}; expected 0"
    result = json.loads((output / "result.json").read_text())
    return float(result["best"]["metric"] / result["baseline"]["base"]["metric"])


def run_rank_checks(device: torch.device) -> Iterator[Check | dict[str, Any]]:
    """Check the work that data-parallel ranks share; collective.

    Args:
        device: device of this rank.
    """
    import torch

    from irdscale.bench.gpu_exact import LIMITS, TUNED_LIMIT, checked, diagonal_error, tuned_error
    from irdscale.distributed.ranks import rank_and_world

    world = rank_and_world()[1]
    limit = LIMITS[torch.float32].diagonal
    for layout in ("replicated", "sharded"):
        work = partial(diagonal_error, "llama", torch.float32, device, layout)
        yield checked(f"Fisher diagonal, {layout}, {world} rank(s)", limit, work)
    yield checked(f"fine_tune, DDP, {world} rank(s)", TUNED_LIMIT, tuned_error)
    if importlib.util.find_spec("deepspeed") is None:
        say("deepspeed is missing: ZeRO-3 is skipped")
        return
    yield checked(f"fine_tune, ZeRO-3, {world} rank(s)", TUNED_LIMIT, partial(tuned_error, zero3()))
    yield zero_row()


def zero3() -> str:
    """The override that trains under ZeRO-3."""
    return f"train.deepspeed={ZERO_FILE}"


def zero_row() -> dict[str, Any]:
    """Steps per second of the quickstart's language model under ZeRO-3, after a warm-up; collective."""
    from irdscale.bench.gpu_exact import tuning_config, tuning_mask
    from irdscale.bench.timing import figure
    from irdscale.distributed.ranks import rank_and_world
    from irdscale.models.build import build_model
    from irdscale.tasks import load_task
    from irdscale.training.control import Control
    from irdscale.training.trainable import sparse_model
    from irdscale.training.trainer import fine_tune

    config = tuning_config(f"train.steps={WARM_UP + MEASURED}", zero3(), batch=16)
    task, seed = load_task(config), config.search.seeds[0]
    plain = tuning_config()
    model = sparse_model(config, task, tuning_mask(build_model(plain, task, seed)[0], config.search.ratio), seed)
    ends: list[float] = []

    def advance(n: float = 1) -> None:
        ends.extend([time.perf_counter()] * int(n))

    fine_tune(model, task, config, seed, Control(advance))
    rate = MEASURED / (ends[-1] - ends[WARM_UP - 1])
    what = f"steps a second under ZeRO-3, {rank_and_world()[1]} rank(s)"
    return figure("train", what, "260K", 128, rate, at_least=ZERO_BAR)


def say(line: str) -> None:
    """Print a line on stdout on the first rank, and flush."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def tell(found: Iterable[Check | dict[str, Any]]) -> int:
    """Print checks and rows as they arrive; returns 1 if a check failed, else 0."""
    from irdscale.bench.timing import line_of

    failed, last = False, time.perf_counter()
    for one in found:
        now = time.perf_counter()
        if isinstance(one, dict):
            say(line_of(one, now - last))
        else:
            say(one.line())
            failed = failed or not one.ok
        last = now
    return int(failed)


def main(arguments: list[str]) -> int:
    """Run one part; returns the exit code."""
    from irdscale.cli.logs import quiet_libraries
    from irdscale.errors import InputError, RunError

    quiet_libraries()
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    ways: dict[str, Callable[[], int]] = {
        "card": _tell_card,
        "exact": _tell_exact,
        "search": lambda: tell(run_search_check(Path(arguments[1]))),
        "ranks": _tell_ranks,
    }
    if not arguments or arguments[0] not in ways or len(arguments) != 1 + (arguments[0] == "search"):
        print(
            f"gpu_check: found {' '.join(arguments) or 'nothing'}; expected one of {', '.join(WAYS)}", file=sys.stderr
        )
        return 2
    try:
        return ways[arguments[0]]()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except RunError as error:
        print(error, file=sys.stderr)
        return 1


def _tell_card() -> int:
    say(card())
    return 0


def _tell_exact() -> int:
    import torch

    from irdscale.bench.gpu_exact import exactness

    return tell(exactness(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def _tell_ranks() -> int:
    import torch

    from irdscale.distributed.process_group import in_process_group, launched

    with in_process_group(always=True):
        gpu = torch.cuda.is_available()
        return tell(run_rank_checks(torch.device("cuda", launched()[1]) if gpu else torch.device("cpu")))


if __name__ == "__main__":
    from irdscale.distributed.process_group import leave

    leave(main(sys.argv[1:]))
