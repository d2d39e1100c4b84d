"""A search on Ray: overhead of scheduling, speedup by workers, and work saved by IRD's nested sets."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from irdscale.bench.timing import figure
from irdscale.config.loader import load_config
from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.search.candidates import Candidate
from irdscale.search.ird import Pair, candidates
from irdscale.search.limits import smallest_pair
from irdscale.search.masks import search_masks

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
REPEATS = 3
# Optimizer steps of a candidate, half the quickstart's.
STEPS = 20


def bench_search(advance: Callable[..., None]) -> list[dict[str, Any]]:
    """Rows of the search; only the overhead is measured repeatedly, because a search takes minutes.

    Raises:
        InputError: Ray or the quickstart's configuration is missing.
    """
    if not CONFIG.is_file():
        raise InputError(f"bench search: found no {CONFIG}", "a checkout of irdscale with its configs")
    try:
        import ray  # noqa: F401
    except ImportError:
        raise InputError("bench search: found no ray", "it installed (pip install 'ray[tune]' tensorboardX)") from None
    with tempfile.TemporaryDirectory(prefix="irdscale-bench-") as folder:
        rows = [_overhead(Path(folder))]
        advance()
        rows += _workers(Path(folder))
        advance()
    return rows


def _config(folder: Path, name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIG, [f"output={folder / name}", "search.runner=ray", *overrides])


_figure = partial(figure, "search", model="minilm", tokens=32)


def _overhead(folder: Path) -> dict[str, Any]:
    """Seconds of a round of 6 trivial candidates beyond the candidates' own time, after the first round."""
    from irdscale.cluster.connect import connected
    from irdscale.search.ray_engine import RayEngine

    config = _config(
        folder, "overhead", "train.steps=1", "fisher.samples=16", "task.limit={train: 64, selection: 16, test: 16}"
    )
    output, seconds = Path(config.output), []
    with connected() as cluster:
        engine = RayEngine(config, 1, output, cluster)
        masks = engine.call(search_masks, False)
        pairs = list(masks.masks)[:3]
        for repeat in range(REPEATS + 1):
            records: list[dict[str, Any]] = []
            asked = [Candidate(masks.masks[p], p, 2 * repeat + seed, 1, "ird") for p in pairs for seed in (0, 1)]
            started = time.perf_counter()
            engine.evaluate(asked, records.append)
            took = time.perf_counter() - started
            at_once = min(len(asked), os.cpu_count() or 1)
            seconds.append(took - sum(r["seconds"] for r in records) / at_once)
    found = sorted(seconds[1:])
    what = "overhead of a round of 6 trivial candidates after the first, s"
    return _figure(what, value=found[len(found) // 2], spread=(found[0], found[-1]), limit=3.0)


def _workers(folder: Path) -> list[dict[str, Any]]:
    """A search with one worker and with two, and the work of a naive search."""
    from irdscale.search.run import run_search

    seconds, results = {}, {}
    for workers in (1, 2):
        ray = [f"search.ray.concurrent={workers}", f"search.ray.fisher_ranks={workers}"]
        config = _config(folder, f"workers{workers}", f"train.steps={STEPS}", *ray)
        started = time.perf_counter()
        results[workers] = run_search(config, progress=False)
        seconds[workers] = time.perf_counter() - started
    found = results[2]
    path = [Pair(step["samples"], step["params"]) for step in found["path"]]
    minimum = smallest_pair(config, path[0], found["model"]["parameters"])
    times = {"1 worker": round(seconds[1], 1), "2 workers": round(seconds[2], 1)}
    return [
        _figure("search with 1 worker / with 2", value=seconds[1] / seconds[2], at_least=1.7) | {"seconds": times},
        _figure(
            "sample gradients of a naive search / of this one",
            value=naive_gradients(path, minimum) / found["sample_gradients"],
            at_least=3.0,
        ),
    ]


def naive_gradients(path: list[Pair], minimum: Pair) -> int:
    """Sample gradients of a search on the same path without reuse between candidates.

    It ranks the state's samples for each candidate that halves them (a gradient each), and computes the Fisher
    information of the kept ones (a gradient each).
    """
    gradients = path[0].samples
    for state in path[:-1]:
        for candidate in candidates(state, minimum):
            ranking = state.samples if candidate.samples < state.samples else 0
            gradients += ranking + candidate.samples
    return gradients
