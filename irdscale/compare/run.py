"""`irdscale compare`: every method with every learning rate and seed, then searches and equal budgets, then the test.

    1. masks: per seed a draw of samples, their traces and the masks of every search; masks of one draw, by other scores
    2. learning rates: every method's first candidate with each rate and seed; each method keeps the rate with the best
       mean on the selection split
    3. budgets: IRD and reverse IRD at that rate, one search per seed; then FISH draws, random masks and trainings with
       other seeds, as many per seed as IRD's evaluations
    4. test: the best candidate on the selection split per method and seed, evaluated once on the test split

Nothing reads the test split before step 4. Methods share evaluations in one ledger, so a comparison that was killed, or
got more methods or seeds, goes on. With a budget of minutes, these steps are done for the first seed, then for the
first two, and so on until time is up; no choice depends on the test split.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irdscale.compare.budget import Budget, TimedEngine
from irdscale.compare.claims import claims_of
from irdscale.compare.method_specs import (
    DRAWN,
    FEW,
    RANKINGS,
    RESTART,
    SCORED,
    SEARCHES,
    Method,
    asked_methods,
    check_comparison,
    owner_of,
    ranking_name,
    slug,
)
from irdscale.compare.methods import (
    dense_candidate,
    far_from_budget,
    fitting_methods,
    model_facts,
    trained,
    with_lora,
)
from irdscale.compare.on_test import base_scores, scores_on_test
from irdscale.compare.results import fewest_samples, measured_costs, method_entries
from irdscale.compare.seed_by_seed import most_evaluations, seed_by_seed
from irdscale.compare.state import Study
from irdscale.compare.study import FILE, read_study
from irdscale.config.compare import SPARSE_LORA
from irdscale.config.schema import RunConfig, training_steps
from irdscale.distributed.ranks import broadcast_flag, failing_together, rank_and_world, write_json_once
from irdscale.runs.folder import held, search_part
from irdscale.search.candidates import Candidate
from irdscale.search.engines import running
from irdscale.search.folder import open_ledger, refuse_changes
from irdscale.search.ird import Pair, Wanted, rounds, together
from irdscale.search.ledger import Ledger
from irdscale.search.mask_store import SearchMasks
from irdscale.search.masks import drawn_mask, random_draw_mask, search_masks
from irdscale.search.run import what_was_searched
from irdscale.search.runner import Runner, WorkItem
from irdscale.tasks import load_task, tell_classes
from irdscale.training.loss_trend import rise_warnings
from irdscale.training.trackers import require_trackers
from irdscale.utils.progress import bar

if TYPE_CHECKING:
    from irdscale.tasks import Task

log = logging.getLogger(__name__)


def run_compare(
    config: RunConfig, progress: bool = True, overwrite: bool = False, budget: Budget | None = None
) -> dict[str, Any]:
    """Compare methods, or go on with a comparison that was interrupted or got more methods, seeds or rates.

    Writes config.yaml, fisher/, masks/, ledger.jsonl and compare.json into `config.output`. Collective if
    torch.distributed is initialised, like `irdscale.search.run.run_search`.

    Args:
        overwrite: whether to remove earlier files of irdscale from the folder.
        budget: starts only what is expected to end in time, complete seeds first; by default all is run.

    Returns:
        The contents of compare.json. Where the time was too short, "seeds" has the seeds that are complete for all
        methods, and "missing" what is missing; without a complete seed, compare.json is not written.

    Raises:
        InputError: the configuration does not fit the data or the model, or the output folder holds other work (names
            it) or is in use.
        RunError: masks could not be made, or the output cannot be written.
    """
    output = Path(config.output)
    check_comparison(config)
    with failing_together():
        require_trackers(config)
        if not overwrite:
            refuse_changes(config, output)
    with held(config, overwrite) as folder:
        with failing_together():
            task = load_task(config)
        folder.claim(task, {"search": search_part(config)})
        tell_classes(task, progress and rank_and_world()[0] == 0)
        if broadcast_flag((output / FILE).exists()):
            result = read_study(output)
            if result["config"]["compare"] == config.compare.model_dump(mode="json") and not result.get("missing"):
                log.info("%s holds this comparison, finished; --overwrite runs it again", output)
                return result
        return _run(config, task, progress, budget)


def _run(config: RunConfig, task: Task, progress: bool, budget: Budget | None) -> dict[str, Any]:
    output = Path(config.output)
    asked = asked_methods(config)
    dense = any(method.kind == "full" for method in asked)
    with running(config, task, output, progress, 1.0 if dense else None) as engine:
        facts = engine.call(model_facts, any(method.lora is not None for method in asked))
        with failing_together():
            methods = fitting_methods(config, facts)
        for line in far_from_budget(methods, facts) if rank_and_world()[0] == 0 else ():
            log.warning("compare.lora.rank: %s", line)
        with open_ledger(config, output) as ledger:
            steps = training_steps(config.train, len(task.trained))
            runner = Runner(config, ledger, engine, output)
            study = Study(config, task, engine, runner, output, progress, facts, methods, steps)
            if budget is not None:
                kinds = {method.name: method.kind for method in methods}
                study.engine = TimedEngine(engine, budget, ledger, config, kinds)
                return seed_by_seed(study, ledger, partial(_with_bar, ledger=ledger))
            result = _with_bar(study, ledger)
            write_json_once(output / FILE, result)
            study.runner.clear()
    return result


def _with_bar(study: Study, ledger: Ledger) -> dict[str, Any]:
    """The result of a study, with a bar of its evaluations."""
    most = most_evaluations(study.config, study.methods, study.facts)
    labels = {method.name: method.label for method in study.methods}
    with bar("Evaluations", most, enabled=study.progress and rank_and_world()[0] == 0) as advance:
        lower = study.task.lower_is_better
        study.runner = Runner(study.config, ledger, study.engine, study.output, advance, lower, labels)
        return _compared(study)


def _compared(study: Study) -> dict[str, Any]:
    started = time.perf_counter()
    _make_masks(study)
    masked = time.perf_counter()
    _choose_rates(study)
    _search(study)
    _spend_budgets(study)
    trained = time.perf_counter()
    chosen = {of: study.best(tried) for of, tried in study.tried.items()}
    tests = scores_on_test(study, [candidate for candidate in chosen.values() if candidate is not None])
    base = None if study.facts.head else dict(zip(("selection", "test", "test_error"), base_scores(study), strict=True))
    methods = method_entries(study, chosen, tests)
    ended = time.perf_counter()
    seconds = {"masks": masked - started, "train": trained - masked, "test": ended - trained, "total": ended - started}
    result = {
        **what_was_searched(study.config, study.task, study.facts.model),
        "reference": study.reference,
        "seeds": study.seeds,
        "learning_rates": list(dict.fromkeys(rate for method in study.methods for rate in study.grid_of(method))),
        "methods": methods,
        "warnings": rise_warnings(
            {f"{one['label']}, seed {seed['seed']}": seed["loss"] for one in methods for seed in one["seeds"]}
        ),
        "costs": measured_costs(study, chosen),
        "budget_warnings": far_from_budget(study.methods, study.facts),
        "base": base,
        "fewest": fewest_samples(study),
        "evaluations": len(study.runner.asked),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    return {**result, "claims": claims_of(result)}


def _make_masks(study: Study) -> None:
    """Make the masks of all rankings, once for methods with equal rankings, and the first drawn masks."""
    owners = {
        (method.name, seed): owner_of(study.methods, method, seed)
        for method in study.methods
        for seed in study.seeds
        if method.kind in RANKINGS and (method.name, seed) not in study.ranking_masks
    }
    own = {(owner.name, seed): owner for (_, seed), owner in owners.items()}
    calls = [
        WorkItem(search_masks, (study.progress, ranking_name(owner, seed)), owner.of_seed(seed))
        for (_, seed), owner in own.items()
    ]
    made: dict[tuple[str, int], SearchMasks] = dict(zip(own, study.engine.call_all(calls), strict=True))
    study.ranking_masks |= {(name, seed): made[owner.name, seed] for (name, seed), owner in owners.items()}
    _make_halves(study)
    drawn = [method for method in study.methods if method.kind in DRAWN]
    _make_draws(study, [(method, seed, 0) for method in drawn for seed in study.seeds])


def _make_halves(study: Study) -> None:
    """Make the masks of half the entries, which LoRA matrices share a budget with: a search's, if it reaches them."""
    every = [(method, seed) for method in study.methods for seed in study.seeds if method.kind == SPARSE_LORA]
    wanted = [(method, seed) for method, seed in every if (method.name, seed) not in study.halves]
    calls = {}
    for method, seed in wanted:
        masks = study.ranking_masks[method.name, seed]
        pair = halved(masks.start)
        if pair in masks.masks:
            study.halves[method.name, seed] = masks.masks[pair]
        else:
            name = f"{slug(method.name)}-{seed}"
            # `pool` draws the samples that the search draws.
            item = WorkItem(random_draw_mask, (pair, study.progress, name, "pool"), method.of_seed(seed))
            calls[method.name, seed] = item
    made = study.engine.call_all(list(calls.values()))
    study.halves |= {of: found["mask"] for of, found in zip(calls, made, strict=True)}


def halved(pair: Pair) -> Pair:
    """The pair with half the parameters."""
    return Pair(pair.samples, max(1, pair.params // 2))


def _make_draws(study: Study, wanted: Sequence[tuple[Method, int, int]]) -> None:
    """Make drawn masks; `wanted` has method, seed and number of the draw."""
    asked = [one for one in wanted if _draw_name(*one) not in study.drawn]
    calls = [
        WorkItem(drawn_mask, (_draw_name(method, seed, draw),), method.of_seed(seed + RESTART * draw))
        for method, seed, draw in asked
    ]
    found = study.engine.call_all(calls)
    study.drawn |= {_draw_name(*one): mask for one, mask in zip(asked, found, strict=True)}


def _draw_name(method: Method, seed: int, draw: int) -> str:
    return f"{slug(method.name)}-{seed}-{draw}"


def _draw(study: Study, method: Method, seed: int, draw: int) -> Candidate:
    """The candidate of a drawn mask, before a learning rate is set."""
    mask, params = study.drawn[_draw_name(method, seed, draw)]
    samples = method.config.fisher.samples if method.kind in SCORED else 0
    return Candidate(mask, Pair(samples, params), seed, None, method.name)


def _first(study: Study, method: Method, seed: int, rate: float) -> Candidate:
    """The candidate with which a method tries a learning rate."""
    if method.kind in RANKINGS:
        masks = study.ranking_masks[method.name, seed]
        pair = masks.fewest if method.kind in FEW else masks.start
        if method.kind == SPARSE_LORA:
            pair = halved(masks.start)
            half = Candidate(study.halves[method.name, seed], pair, seed, None, method.name)
            return trained(method, with_lora(method, study.facts, half), rate)
        return trained(method, Candidate(masks.masks[pair], pair, seed, None, method.name), rate)
    if method.kind in DRAWN:
        return trained(method, _draw(study, method, seed, 0), rate)
    return dense_candidate(method, study.facts, rate, seed)


def _choose_rates(study: Study) -> None:
    """Choose each method's learning rate by the mean over seeds on the selection split."""
    firsts = {
        (method.name, rate): [_first(study, method, seed, rate) for seed in study.seeds]
        for method in study.methods
        for rate in study.grid_of(method)
    }
    study.evaluate([candidate for of_rate in firsts.values() for candidate in of_rate])
    for method in study.methods:
        means = {}
        for rate in study.grid_of(method):
            found = [study.runner.metric(candidate) for candidate in firsts[method.name, rate]]
            ended = [metric for metric in found if metric is not None]
            study.grids.setdefault(method.name, []).append(
                {"learning_rate": rate, "selection": sum(ended) / len(ended) if len(ended) == len(found) else None}
            )
            if ended:
                means[rate] = len(ended), study.better(sum(ended) / len(ended))
        # A rate with failed seeds is worse than any without.
        study.rates[method.name] = max(means, key=lambda rate: means[rate]) if means else None
        kept = study.rates[method.name] or study.grid_of(method)[0]
        for seed, candidate in zip(study.seeds, firsts[method.name, kept], strict=True):
            study.tried[method.name, seed] = [candidate]
    kept_keys = {one.key(study.config) for tried in study.tried.values() for one in tried}
    study.runner.drop({one.key(study.config) for of_rate in firsts.values() for one in of_rate} - kept_keys)


def _search(study: Study) -> None:
    """Run all searches together, each with one seed at its method's learning rate."""
    started = [
        (method, seed)
        for method in study.methods
        for seed in study.seeds
        if method.kind in SEARCHES and study.runner.metric(study.tried[method.name, seed][0]) is not None
    ]

    def candidate(method: Method, pair: Pair, seed: int) -> Candidate:
        mask = study.ranking_masks[method.name, seed].masks[pair]
        rate = study.rates[method.name]
        assert rate is not None
        return trained(method, Candidate(mask, pair, seed, None, method.name), rate)

    def evaluate(asked: list[tuple[int, Wanted] | None]) -> list[list[float | None]]:
        wanted = [
            [candidate(method, pair, seed) for pair, seed in of_one[1]]
            for (method, _), of_one in zip(started, asked, strict=True)
            if of_one is not None
        ]
        study.evaluate([one for of_one in wanted for one in of_one])
        return [[study.runner.metric(one) for one in of_one] for of_one in wanted]

    lower, searches = study.task.lower_is_better, []
    for method, seed in started:
        masks, search = study.ranking_masks[method.name, seed], method.config.search
        searches.append(rounds(masks.start, masks.minimum, [seed], search.max_rounds, search.patience, lower))
    for (method, seed), outcome in zip(started, together(searches, evaluate), strict=True):
        study.tried[method.name, seed] += [candidate(method, pair, seed) for pair in list(outcome.means)[1:]]
        study.spent[method.name, seed] = outcome.evaluations


def _spend_budgets(study: Study) -> None:
    """Evaluate FISH draws, random masks and other seeds, as many as IRD evaluated candidates for each seed."""
    spending = [
        (method, seed, rate)
        for method in study.methods
        for seed in study.seeds
        if (rate := study.rates[method.name]) is not None and ("ird", seed) in study.spent
    ]
    draws = _make_fish_draws(study, [(method, seed) for method, seed, _ in spending if method.kind == "fish_best"])
    if study.config.compare.equal_budget:
        random = [(method, seed) for method, seed, _ in spending if method.kind == "random_mask"]
        _make_draws(study, [(*one, draw) for one in random for draw in range(1, study.spent["ird", one[1]])])
    further: dict[tuple[str, int], list[Candidate]] = {}
    for method, seed, rate in spending:
        candidates = draws.get((method.name, seed)) or _further(study, method, seed)
        further[method.name, seed] = [trained(method, candidate, rate) for candidate in candidates]
    study.evaluate([candidate for of_one in further.values() for candidate in of_one])
    for of, candidates in further.items():
        study.tried[of] += candidates
        study.spent.setdefault(of, len(study.tried[of]))


def _make_fish_draws(study: Study, asked: Sequence[tuple[Method, int]]) -> dict[tuple[str, int], list[Candidate]]:
    """FISH masks of the sizes that IRD evaluated beyond its start, each from its own random samples."""
    wanted: list[tuple[Method, int, Pair, int]] = []
    for method, seed in asked:
        searched, spent = [candidate.pair for candidate in study.tried["ird", seed][1:]], study.spent["ird", seed] - 1
        # Failed evaluations count, so there may be more draws than pairs.
        for place in range(spent if searched else 0):
            wanted.append((method, seed, searched[place % len(searched)], place // len(searched)))
    calls = []
    for method, seed, pair, again in wanted:
        suffix = f"-{again}" if again else ""
        name, purpose = f"{slug(method.name)}-{seed}{suffix}", f"fish-{pair.samples}-{pair.params}{suffix}"
        calls.append(WorkItem(random_draw_mask, (pair, study.progress, name, purpose), method.of_seed(seed)))
    drawn: dict[tuple[str, int], list[Candidate]] = {(method.name, seed): [] for method, seed in asked}
    for (method, seed, pair, _), draw in zip(wanted, study.engine.call_all(calls), strict=True):
        drawn[method.name, seed].append(Candidate(draw["mask"], pair, seed, None, method.name))
        study.gradients[method.name, seed] = study.gradients.get((method.name, seed), 0) + draw["sample_gradients"]
    return drawn


def _further(study: Study, method: Method, seed: int) -> list[Candidate]:
    """Further candidates of a method without ranking or search, for an equal budget."""
    if method.kind in (*RANKINGS, *SCORED) or not study.config.compare.equal_budget:
        return []
    again = range(1, study.spent["ird", seed])
    if method.kind == "random_mask":
        return [_draw(study, method, seed, draw) for draw in again]
    return [replace(study.tried[method.name, seed][0], seed=seed + RESTART * start) for start in again]
