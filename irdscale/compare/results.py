"""The result of a comparison by method: scores, differences to the reference, and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from irdscale.compare.method_specs import RANKINGS, SCORED, SEARCHES, Method
from irdscale.compare.state import Study
from irdscale.config.compare import SPARSE_LORA
from irdscale.config.kinds import METRIC_RANGES
from irdscale.report.statistics import interval, paired_methods
from irdscale.search.candidates import Candidate
from irdscale.search.limits import reachable_sizes


def method_entries(
    study: Study, chosen: dict[tuple[str, int], Candidate | None], tests: dict[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    """The "methods" of compare.json.

    Args:
        chosen: (method, seed) -> candidate that is best on the selection split; None if all failed.
        tests: key -> test metric of a chosen candidate, and its standard error.
    """
    entries = [_entry(study, method, chosen, tests) for method in study.methods]
    reference = next(entry for entry in entries if entry["name"] == study.reference)
    lower, within = study.task.lower_is_better, METRIC_RANGES[study.task.metric]
    for entry in entries:
        entry["difference"] = None if entry is reference else paired_methods(reference, entry, lower, within)
    return entries


def measured_costs(study: Study, chosen: dict[tuple[str, int], Candidate | None]) -> dict[str, dict[str, float | None]]:
    """Method -> "seconds" of a training, "adapter_bytes" and "peak_bytes" of its best candidates.

    Seconds and bytes are means over the seeds, the peak of GPU memory is the largest; None for what is unknown.
    """
    found = {}
    for method in study.methods:
        best = [chosen[method.name, seed] for seed in study.seeds]
        costs = [study.runner.costs(candidate) for candidate in best if candidate is not None]
        known = {name: [cost[name] for cost in costs if cost[name] is not None] for name in COSTS}
        found[method.name] = {name: COSTS[name](values) if values else None for name, values in known.items()}
    return found


def fewest_samples(study: Study) -> int | None:
    """The fewest samples that a search can reach in its rounds; None without a search."""
    ends = []
    for method in study.methods:
        if method.kind in SEARCHES:
            masks, search = study.ranking_masks[method.name, study.seeds[0]], method.config.search
            ends.append(reachable_sizes(masks.start, masks.minimum)[0][: search.max_rounds + 1][-1])
    return min(ends, default=None)


def _entry(
    study: Study,
    method: Method,
    chosen: dict[tuple[str, int], Candidate | None],
    tests: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    seeds: list[dict[str, Any]] = []
    for seed in study.seeds:
        tried, best = study.tried[method.name, seed], chosen[method.name, seed]
        test, error = (None, None) if best is None else tests[best.key(study.config)]
        seeds.append(
            {
                "seed": seed,
                "selection": None if best is None else study.runner.metric(best),
                "test": test,
                "test_error": error,
                "samples": None if best is None or not best.pair.samples else best.pair.samples,
                "pool": study.ranking_masks[method.name, seed].start.samples if method.kind in RANKINGS else None,
                "params": None if best is None else best.pair.params,
                "mask": None if best is None else best.mask,
                "loss": None if best is None else study.runner.trend(best),
                "evaluations": len(study.grid_of(method)) + study.spent.get((method.name, seed), 1) - 1,
                "error": study.runner.error(tried[0]) if best is None else None,
            }
        )
    ended, within = [one for one in seeds if one["test"] is not None], METRIC_RANGES[study.task.metric]
    per_training = study.config.train.batch_size * study.steps
    warmed = method.kind in (*RANKINGS, *SCORED)
    warming = method.config.fisher.head_warmup * study.config.train.batch_size if warmed else 0
    gradients = warming + _mean([_gradients(study, method, seed) for seed in study.seeds])
    spent = _mean([study.spent.get((method.name, seed), 1) for seed in study.seeds])
    return {
        "name": method.name,
        "label": method.label,
        "what": method.what(study.facts.ranks.get(method.name)),
        "learning_rate": study.rates[method.name],
        "grid": study.grids[method.name],
        "evaluations": _mean([one["evaluations"] for one in seeds]),
        "fine_tunings": round(spent + gradients / per_training, 3),
        "params": _mean([one["params"] for one in ended]) if ended else None,
        "seeds": seeds,
        "test": interval([one["test"] for one in ended], within),
        # All seeds share the test samples, so averaging over seeds does not reduce this error.
        "test_error": _mean([one["test_error"] for one in ended]) if ended else None,
        "selection": interval([one["selection"] for one in ended], within),
    }


def _gradients(study: Study, method: Method, seed: int) -> int:
    """Sample gradients that a method's masks would take if it shared them with no other.

    Of forward passes alone, three count as one gradient.
    """
    if method.kind in SCORED:
        return method.config.fisher.samples // (3 if method.kind == "activation" else 1)
    if method.kind not in RANKINGS:
        return 0
    masks = study.ranking_masks[method.name, seed]
    if method.kind == "fish_best":
        return masks.start.samples + study.gradients.get((method.name, seed), 0)
    alone = {"fish": masks.start.samples, "fish_small": masks.fewest.samples}
    alone[SPARSE_LORA] = masks.start.samples
    return alone.get(method.kind, int(masks.facts["sample_gradients"]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# What is said of the costs of a method's seeds.
COSTS: dict[str, Callable[[Sequence[float]], float]] = {"seconds": _mean, "adapter_bytes": _mean, "peak_bytes": max}
