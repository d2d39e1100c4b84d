"""A comparison in little time: complete seeds first, and what is missing of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from irdscale.compare.budget import OutOfTime
from irdscale.compare.method_specs import RANKINGS, RESTART, SCORED, SEARCHES, Method, rates_of
from irdscale.compare.methods import ModelFacts
from irdscale.compare.state import Study
from irdscale.compare.study import FILE, read_study
from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import broadcast_json, failing_together, rank_and_world, write_json_once
from irdscale.search.ird import Pair
from irdscale.search.ledger import Ledger
from irdscale.search.limits import most_of_rounds, smallest_pair
from irdscale.search.run import what_was_searched
from irdscale.utils.formats import duration


def seed_by_seed(whole: Study, ledger: Ledger, compared: Callable[[Study], dict[str, Any]]) -> dict[str, Any]:
    """The result of the first seed, of the first two, and so on, until the engine's time is up.

    Args:
        compared: the result of a study.

    Returns:
        The contents of compare.json; without a complete seed it has no methods, and is not written.
    """
    seeds, result = whole.seeds, _complete_seeds(whole)
    for complete in range(len(result["seeds"]), len(seeds)):
        part = whole.of_first(complete + 1)
        try:
            result = compared(part)
        except OutOfTime as stop:
            result["missing"] = missing_of(part, whole.config, ledger, complete, stop)
            if complete:
                write_json_once(whole.output / FILE, result)
            return result
        if part.seeds != seeds:
            result["missing"] = missing_of(part, whole.config, ledger, complete + 1, None)
        write_json_once(whole.output / FILE, result)
    whole.runner.clear()
    return result


def _complete_seeds(whole: Study) -> dict[str, Any]:
    """The result of an earlier call with the first seeds, on every rank; without one, a result of no seeds."""
    found: dict[str, Any] = {}
    with failing_together():
        if rank_and_world()[0] == 0 and (whole.output / FILE).exists():
            stored = read_study(whole.output)
            count = len(stored["seeds"])
            own = whole.of_first(count).config.compare.model_dump(mode="json")
            if count < len(whole.seeds) and stored["config"]["compare"] == own:
                found = stored
    found = broadcast_json(found)
    return found or {**what_was_searched(whole.config, whole.task, whole.facts.model), "seeds": [], "methods": []}


def most_evaluations(config: RunConfig, methods: list[Method], facts: ModelFacts) -> int:
    """Upper bound of the requested evaluations, for the progress bar."""
    return sum(_most_of_one(config, methods, facts, method) for method in methods) * len(config.compare.seeds)


def _most_of_one(config: RunConfig, methods: list[Method], facts: ModelFacts, method: Method) -> int:
    """Upper bound of the evaluations that a method requests for one seed."""
    most = len(rates_of(config, method.name))
    if method.kind in SEARCHES:
        # A search requests its start again, at the chosen rate.
        return most + 1 + _most_searched(method, facts)
    if method.kind == "fish_best" or (config.compare.equal_budget and method.kind not in (*RANKINGS, *SCORED)):
        most += next((_most_searched(one, facts) for one in methods if one.name == "ird"), 0)
    return most


def _most_searched(method: Method, facts: ModelFacts) -> int:
    """Upper bound of the evaluations after the start in one seed's search."""
    search, parameters = method.config.search, facts.model["parameters"]
    start = Pair(method.config.fisher.samples, max(1, round(search.ratio * parameters)))
    return most_of_rounds(start, smallest_pair(method.config, start, parameters), search.max_rounds, 1)


def missing_of(part: Study, config: RunConfig, ledger: Ledger, complete: int, stop: OutOfTime | None) -> dict[str, Any]:
    """The "missing" of compare.json.

    Args:
        part: the study that was stopped or that is complete.
        config: configuration of the whole comparison.
        complete: number of seeds that are complete for all methods, the first ones.
        stop: evaluation or pass that did not fit into the time; None if nothing was stopped.

    Returns:
        "done" and "of" (evaluations; "of" is an upper bound), "exact" (whether "of" is exact), "next" (text, or None),
        and "seeds": for each missing seed the "methods" with "name", "label", "done" and "most" evaluations.
    """
    names = {method.name for method in part.methods}
    done = {
        record["key"]
        for record in ledger.records
        if record["direction"] in names and record["seed"] % RESTART in config.compare.seeds
    }
    return {
        "done": len(done),
        "of": max(len(done), most_evaluations(config, part.methods, part.facts)),
        "exact": not any(method.kind in SEARCHES for method in part.methods),
        "next": None if stop is None else _next(stop),
        "seeds": [{"seed": seed, "methods": _missing(part, config, seed)} for seed in config.compare.seeds[complete:]],
    }


def _next(stop: OutOfTime) -> str:
    if stop.left <= 0:
        return f"{stop.what}; no time is left"
    return f"{stop.what}, for which {duration(stop.seconds)} are expected, and {duration(stop.left)} are left"


def _missing(part: Study, config: RunConfig, seed: int) -> list[dict[str, Any]]:
    """The methods whose evaluations of a seed are missing, at least in part."""
    found = []
    for method in part.methods:
        own = [one for one in part.requested if (one.direction, one.seed % RESTART) == (method.name, seed)]
        done = sum(part.runner.metric(one) is not None or part.runner.error(one) is not None for one in own)
        most = _most_of_one(config, part.methods, part.facts, method)
        if done < most and (method.name, seed) not in part.spent:
            found.append({"name": method.name, "label": method.label, "done": done, "most": most})
    return found
