"""A search on Ray: what scheduling costs, what workers and speculation gain, and the work that IRD's order spares."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from irdscale.config import RunConfig, load_config
from irdscale.errors import InputError
from irdscale.search.candidates import Candidate
from irdscale.search.ird import Pair, candidates, ird, likely_next
from irdscale.search.runner import Runner

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
ROUNDS = 3
REPEATS = 3
# Of a candidate's training; the quickstart's own would take twice as long.
STEPS = 20
# What a stand-in for a candidate waits, by how many halvings it is from the start; as if its accelerator worked.
WAITS_S = (4.0, 6.0)


def bench_search(advance: Callable[..., None]) -> list[dict[str, Any]]:
    """Rows of the search, each measured once but the overhead: a search takes minutes.

    Raises:
        InputError: Ray, or the quickstart that is searched, is not here.
    """
    if not CONFIG.is_file():
        raise InputError(f"bench search: found no {CONFIG}; expected a checkout of irdscale with its configs")
    try:
        import ray  # noqa: F401
    except ImportError:
        raise InputError("bench search: found no ray; expected it installed (pip install 'irdscale[ray]')") from None
    with tempfile.TemporaryDirectory(prefix="irdscale-bench-") as folder:
        rows = [_overhead(Path(folder))]
        advance()
        rows += _workers(Path(folder))
        advance()
        rows.append(_speculation(Path(folder)))
        advance()
    return rows


def _config(folder: Path, name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIG, [f"output={folder / name}", "search.runner=ray", *overrides])


def _overhead(folder: Path) -> dict[str, Any]:
    """Seconds of a round of 6 trivial candidates beyond what the candidates themselves take, after the first round."""
    from irdscale.cluster.connect import connected
    from irdscale.search.masks import search_masks
    from irdscale.search.ray import RayEngine

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
    middle = sorted(seconds[1:])
    return _row(
        "overhead of a round of 6 trivial candidates after the first, s",
        middle[len(middle) // 2],
        low=middle[0],
        high=middle[-1],
        limit=3.0,
    )


def _workers(folder: Path) -> list[dict[str, Any]]:
    """A real search with one worker and with two, and what a search without memory would have done."""
    from irdscale.search.run import run_search

    seconds, results = {}, {}
    for workers in (1, 2):
        ray = [f"search.ray.concurrent={workers}", f"search.ray.fisher_ranks={workers}"]
        config = _config(folder, f"workers{workers}", f"train.steps={STEPS}", *ray)
        started = time.perf_counter()
        results[workers] = run_search(config, progress=False)
        seconds[workers] = time.perf_counter() - started
    found = results[2]
    start = Pair(found["path"][0]["samples"], found["path"][0]["params"])
    naive = naive_work([Pair(s["samples"], s["params"]) for s in found["path"]], _minimum(config, found), 2)
    assert start == Pair(config.fisher.samples, start.params)
    return [
        {
            **_row("search with 1 worker / with 2", seconds[1] / seconds[2], at_least=1.7),
            "seconds": {"1 worker": round(seconds[1], 1), "2 workers": round(seconds[2], 1)},
        },
        _row("sample gradients of a naive search / of this one", naive[0] / found["sample_gradients"], at_least=3.0),
        _row("evaluations of a naive search / of this one", naive[1] / found["evaluations"]),
    ]


def _minimum(config: RunConfig, found: dict[str, Any]) -> Pair:
    ratio = config.search.min_ratio if config.search.min_ratio is not None else config.search.ratio / 8
    return Pair(config.search.min_samples, max(1, round(ratio * found["model"]["parameters"])))


def naive_work(path: list[Pair], minimum: Pair, seeds: int) -> tuple[int, int]:
    """Sample gradients and evaluations of a search on the same path that keeps nothing from candidate to candidate.

    It ranks the state's samples for each candidate that halves them (a gradient each), takes the Fisher information of
    the kept ones (a gradient each), and evaluates pairs again that an earlier round had.
    """
    gradients, evaluations = path[0].samples, seeds
    for state in path[:-1]:
        for candidate in candidates(state, minimum):
            ranking = state.samples if candidate.samples < state.samples else 0
            gradients += ranking + candidate.samples
            evaluations += seeds
    return gradients, evaluations


def _speculation(folder: Path) -> dict[str, Any]:
    """A search of rounds of 3 candidates on 4 workers with speculation, against none.

    Candidates wait instead of training: two processors cannot show what four accelerators would.
    """
    from irdscale.cluster.connect import connected
    from irdscale.search.ray import RayEngine
    from irdscale.search.shared import SharedLedger

    seconds, best = {}, set()
    start, minimum = Pair(256, 4096), Pair(16, 256)
    masks = {Pair(s, p): f"{s}-{p}" for s in _halves(256) for p in _halves(4096)}
    for speculate in (False, True):
        config = _config(
            folder, f"speculate-{speculate}", "search.seeds=[0]", f"search.ray.speculate={str(speculate).lower()}"
        )
        output = Path(config.output)
        with connected(cpus=4) as cluster, SharedLedger(output / "ledger.jsonl") as ledger:
            runner = Runner(config, ledger, RayEngine(config, 1, output, cluster, evaluation=_wait), output)
            # The first round starts the cluster's processes.
            runner.evaluate_round(0, [(start, 0)], masks)
            started = time.perf_counter()
            outcome = ird(start, minimum, [0], ROUNDS, ROUNDS, partial(_round, runner, masks, minimum))
            seconds[speculate] = time.perf_counter() - started
            best.add(outcome.best)
    assert len(best) == 1
    row = _row("rounds of 3 waiting candidates on 4 workers, speculating / not", seconds[True] / seconds[False])
    return row | {"seconds": {"speculating": round(seconds[True], 1), "not": round(seconds[False], 1)}}


def _round(
    runner: Runner, masks: dict[Pair, str], minimum: Pair, number: int, wanted: list[tuple[Pair, int]]
) -> list[float | None]:
    return runner.evaluate_round(number, wanted, masks, likely_next([pair for pair, _ in wanted], minimum))


def _halves(value: int) -> Iterator[int]:
    while value:
        yield value
        value //= 2


def _wait(config: RunConfig, output: Path, candidate: Candidate, optional: bool, talk: Any) -> dict[str, Any] | None:
    """A stand-in for an evaluation, better the more was halved; it makes room when asked, and then starts over."""
    short, long = WAITS_S
    seconds = short + (long - short) * ((candidate.pair.samples * 7 + candidate.pair.params) % 5) / 4
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.1)
        talk.say(step=1, of=1)
        if talk.pausing():
            return None
    record: dict[str, Any] = candidate.record(config)
    metric = 1 / (candidate.pair.samples + candidate.pair.params / 64)
    return record | {"metric": metric, "status": "ok", "seconds": seconds}


def _row(
    what: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    limit: float | None = None,
    at_least: float | None = None,
) -> dict[str, Any]:
    met = None
    if limit is not None:
        met = value <= limit
    elif at_least is not None:
        met = value >= at_least
    return {
        "part": "search",
        "what": what,
        "model": "minilm" if "waiting" not in what else "-",
        "tokens": 32 if "waiting" not in what else 0,
        "ratio": round(value, 3),
        "low": round(value if low is None else low, 3),
        "high": round(value if high is None else high, 3),
        "bar": f"<= {limit}" if limit is not None else f">= {at_least}" if at_least is not None else "",
        "met": met,
        "seconds": {},
    }
