"""Settings of every test: no network, one thread, the repository's root importable, slow tests only when asked for."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Read by huggingface_hub when it is imported, so it must be set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two threads of a tiny model wait for each other, for minutes where other processes want the processors too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irdscale.distributed.process_group import free_port

# The files that take longest, longest first: two workers begin with them, and share small tests at the end.
LONG = [
    f"tests/{name}.py"
    for name in (
        "distributed/test_deepspeed",
        "search/test_ray_engine",
        "compare/test_ray",
        "distributed/test_process_group",
        "fisher/test_partitioned",
        "test_readme",
        "search/test_ray_calls",
        "cluster/test_supervisor",
        "search/test_run",
        "cli/test_gpu_check",
        "fisher/test_ranks",
        "fisher/test_kernels",
        "fisher/test_checkpoint",
        "test_configs",
    )
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items[:] = _dealt(items, config.rootpath)
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


def _dealt(items: list[pytest.Item], root: Path) -> list[pytest.Item]:
    """The tests in two halves, of which each begins with every other one of the long files."""
    of_file: dict[str, list[pytest.Item]] = {name: [] for name in LONG}
    short: list[pytest.Item] = []
    for item in items:
        of_file.get(item.path.relative_to(root).as_posix(), short).append(item)
    first, second = ([item for name in LONG[start::2] for item in of_file[name]] for start in (0, 1))
    room = max(0, len(items) // 2 - len(first))
    return [*first, *short[:room], *second, *short[room:]]


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Leave imported objects out of garbage collection: the Trainer's takes half of a tiny training's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def ranks_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of a store, which DeepSpeed takes from the environment."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port("127.0.0.1")))
