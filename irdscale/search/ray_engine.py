"""The Ray engine: one Tuner for each round, whose trials are the round's (candidate, seed) evaluations.

Features: as many trials at once as the cluster has room for; trials of several ranks, with DeepSpeed or without; trials
whose process or node is lost start again from the state that their training saved last, those that hang are ended and
start again too; one writer of the ledger, this process; early stopping of what falls behind (ASHA). Fisher passes and
test scores run on the cluster as well, so that this process needs neither a GPU nor room for a model.

Constraints: all nodes share the output folder, and find the model and the data at the paths of the configuration.

A trial (`irdscale.cluster.trial`) is an actor that computes nothing: it asks the supervisor
(`irdscale.cluster.supervisor`) to run a job and waits. So the processes that compute outlive it with all that they
have imported, a hung one can be ended from outside, and trials sit on the head node.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from irdscale.cluster.connect import Cluster, answer, beside, check_nodes, connected, fitting, has_gpus, nodes
from irdscale.cluster.live_table import watching
from irdscale.cluster.share import cards, counted, is_share
from irdscale.cluster.supervisor import Job
from irdscale.cluster.trial import JobTrial
from irdscale.cluster.worker import RankGroup, SupervisorClient, packed, unpacked
from irdscale.config.schema import RunConfig, training_steps
from irdscale.errors import InputError, RunError
from irdscale.plan.share import Sharing, said_of, sharing_of
from irdscale.search.candidates import Candidate, run_candidate
from irdscale.search.curves import curves
from irdscale.search.ird import Pair
from irdscale.search.ledger import stopped_early
from irdscale.search.runner import WorkItem
from irdscale.tasks import load_task
from irdscale.training.base_model import KeptBase, keeping
from irdscale.training.control import Control, Paused

if TYPE_CHECKING:
    from irdscale.tasks import Task

T = TypeVar("T")
log = logging.getLogger(__name__)
# How long trials may take to save their state when the search is interrupted.
PAUSE_S = 30.0


@contextmanager
def ray_engine(config: RunConfig, task: Task, output: Path, progress: bool) -> Iterator[RayEngine]:
    """Connect to the cluster, check its nodes, and run the body; an interrupt lets trials save their state first.

    Raises:
        InputError: there is no cluster, a node does not share the output folder, no trial can ever fit, or trials that
            share a GPU take more memory than it has.
    """
    with connected() as cluster:
        check_nodes(output)
        steps = training_steps(config.train, len(task.trained))
        engine = RayEngine(config, steps, output, cluster, lower_is_better=task.lower_is_better)
        if config.search.ray.shares_gpus:
            shared = sharing(config, task)
            log.log(logging.WARNING if shared.fits is False else logging.INFO, said_of(shared))
        with watching(cluster.supervisor, enabled=progress):
            try:
                yield engine
            except KeyboardInterrupt:
                log.info("interrupted: trials save their state (again to end at once)")
                _pause_all(cluster.supervisor)
                raise


def rank_group_of(config: RunConfig, ranks: int, exclusive: bool = False) -> RankGroup:
    """The ranks of one job, on the cluster that this process is connected to.

    Args:
        exclusive: each has its GPU alone, also where trials share one.
    """
    asked = config.search.ray
    gpus: float = int(has_gpus()) if asked.gpus_per_rank is None else asked.gpus_per_rank
    if is_share(gpus):
        gpus = 1 if exclusive else counted(gpus)
    grouped = config.train.deepspeed is not None
    return RankGroup(ranks, asked.cpus_per_rank, gpus, asked.placement == "spread", grouped, config.distributed)


def sharing(config: RunConfig, task: Task) -> Sharing:
    """How trials share the GPUs of the cluster that this process is connected to.

    Raises:
        InputError: they take more memory than there is.
    """
    share = rank_group_of(config, config.search.ray.ranks).gpus
    return sharing_of(config, share, cards(share), task.longest)


class RayEngine:
    """Runs jobs on a cluster; see `irdscale.search.runner.Engine`."""

    def __init__(
        self,
        config: RunConfig,
        steps: int,
        output: Path,
        cluster: Cluster,
        lower_is_better: bool = False,
    ) -> None:
        """An engine on a connected cluster.

        Args:
            steps: of a candidate's training.
            lower_is_better: of the selection metric.
        """
        self._mode = "min" if lower_is_better else "max"
        self._config, self._steps, self._output, self._cluster = config, steps, output.absolute(), cluster
        asked = config.search.ray
        self._trial = rank_group_of(config, asked.ranks)
        # Sums over samples take more than a trial does, and no trial runs beside them.
        self._fisher = rank_group_of(config, asked.fisher_ranks or asked.ranks, exclusive=True)
        for key, rank_group in (("ranks", self._trial), ("fisher_ranks", self._fisher)):
            if fitting(rank_group) == 0:
                problem = (
                    f"search.ray.{key}: found {rank_group.size} x {rank_group.cpus} CPUs and {rank_group.gpus:g} GPUs, "
                    f"which do not fit on the cluster ({'; '.join(map(_described, nodes()))})"
                )
                if cluster.own:
                    raise InputError(f"{problem}; expected less, or a larger cluster")
                log.warning("%s; waiting for nodes that join", problem)

    def call(self, work: Callable[..., T], *args: Any) -> T:
        (result,) = self.call_all([WorkItem(work, args)])
        return cast(T, result)

    def call_all(
        self, calls: Sequence[WorkItem], ended: Callable[[int, Any], None] = lambda place, result: None
    ) -> list[Any]:
        asked, supervisor = self._config.search.ray, self._cluster.supervisor
        results: list[Any] = [None] * len(calls)
        failures, left, following = [0] * len(calls), deque(range(len(calls))), dict[Any, int]()
        try:
            while left or following:
                while left and len(following) < (asked.concurrent or len(calls)):
                    place = left.popleft()
                    following[self._begin(calls, place)] = place
                # With a limit, so that an interrupt comes through.
                for over in ray.wait(list(following), timeout=1.0)[0]:
                    place = following.pop(over)
                    try:
                        results[place] = unpacked(answer(over)["result"])
                    except RunError as lost:
                        failures[place] += 1
                        if failures[place] > asked.max_failures:
                            raise
                        log.warning("%s: %s; starting it again", _said(calls, place), lost)
                        left.append(place)
                        continue
                    ended(place, results[place])
        except Exception:
            for place in following.values():
                answer(supervisor.stop.remote(_name(calls, place)))
            raise
        return results

    def _begin(self, calls: Sequence[WorkItem], place: int) -> Any:
        """Start a call; what its end can be waited for with."""
        call, supervisor, silent_s = calls[place], self._cluster.supervisor, 60 * self._config.search.ray.silent_minutes
        work = partial(_called, self._config, call.config or self._config, self._output, call.work, call.args)
        label = {"what": _said(calls, place)}
        rank_group = self._trial if call.light and is_share(self._trial.gpus) else self._fisher
        answer(supervisor.start.remote(Job(_name(calls, place), packed(work), rank_group, silent_s, label=label)))
        return supervisor.follow.remote(_name(calls, place))

    def evaluate(self, candidates: Sequence[Candidate], ended: Callable[[dict[str, Any]], None]) -> None:
        asked, supervisor = self._config.search.ray, self._cluster.supervisor
        by_name = {candidate.key(self._config): candidate for candidate in candidates}
        journal = _Journal(self._config, by_name, ended, supervisor)
        fits = fitting(self._trial)
        room = asked.concurrent or (fits if self._cluster.own else max(fits, len(candidates)))
        # What the winner is compared with is not compared with each other.
        early = asked.early_stopping and all(candidate.round is not None for candidate in candidates)
        jobs = [self._job(name, candidate) for name, candidate in by_name.items()]
        ray.get(supervisor.close.remote(False))
        with tempfile.TemporaryDirectory(prefix="irdscale-tune-") as scratch:
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(JobTrial, supervisor=supervisor),
                    tune.PlacementGroupFactory([beside() or {"memory": 1}]),
                ),
                param_space={"job": tune.grid_search(jobs)},
                tune_config=tune.TuneConfig(
                    trial_dirname_creator=lambda trial: trial.trial_id,
                    scheduler=_scheduler(self._config, self._steps, by_name, self._mode) if early else None,
                    reuse_actors=True,
                    max_concurrent_trials=max(1, min(room, len(jobs))),
                ),
                run_config=tune.RunConfig(
                    name="round",
                    storage_path=scratch,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=asked.max_failures),
                    callbacks=[journal],
                ),
            )
            tuner.fit()
        if journal.error is not None:
            raise journal.error

    def _job(self, name: str, candidate: Candidate) -> Job:
        asked = self._config.search.ray
        return Job(
            name,
            packed(partial(_evaluated, self._config, self._output, candidate)),
            self._trial,
            silent_s=60 * asked.silent_minutes,
            limit_s=None if asked.trial_minutes is None else 60 * asked.trial_minutes,
            label={"round": candidate.round, "what": str(candidate)},
        )


def _name(calls: Sequence[WorkItem], place: int) -> str:
    return f"{calls[place].work.__name__}-{place}"


def _said(calls: Sequence[WorkItem], place: int) -> str:
    """What people read of a call."""
    words = calls[place].work.__name__.replace("_", " ")
    return words if len(calls) == 1 else f"{words}, {place + 1} of {len(calls)}"


class _Journal(tune.Callback):
    """Writes the record of each trial that has ended, in this process.

    Attributes:
        error: what the search itself died of, if it did.
    """

    def __init__(
        self,
        config: RunConfig,
        candidates: dict[str, Candidate],
        ended: Callable[[dict[str, Any]], None],
        supervisor: Any,
    ) -> None:
        self._config, self._candidates, self._ended, self._supervisor = config, candidates, ended, supervisor
        self.error: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks, to restore what nobody restores here.
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result, name = trial.last_result or {}, trial.config["job"].name
        if "bad_input" in result:
            self._fail(InputError(result["bad_input"]))
        elif "result" in result:
            # None where it was asked to pause.
            if result["result"] is not None:
                self._end(result["result"])
        else:
            stopped = stopped_early(result.get("steps", 0), result.get("metric", math.nan))
            seconds = round(result.get("time_total_s", 0.0), 3)
            self._end(self._candidates[name].record(self._config) | {"error": stopped, "seconds": seconds})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["job"].name
        text = ray.get(self._supervisor.why.remote(name)) or "its trial was lost, with its process or its node"
        log.warning("%s failed: %s", self._candidates[name], text)
        self._end(self._candidates[name].record(self._config) | {"error": text})

    def _end(self, record: dict[str, Any]) -> None:
        try:
            self._ended(record)
        except Exception as error:  # such as a full disk
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error = self.error or error
        ray.get(self._supervisor.close.remote(True))


class _ByFirstSeed(AsyncHyperBandScheduler):
    """ASHA over the trials of one seed; those of the others go as their pair's does.

    A pair counts only with all of its seeds, so they must not be judged one by one.
    """

    def __init__(self, seed: int, candidates: dict[str, Candidate], **options: Any) -> None:
        super().__init__(**options)
        self._seed, self._candidates, self._stopped_pairs = seed, candidates, set[Pair]()

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        candidate = self._candidates[trial.config["job"].name]
        if candidate.seed != self._seed:
            return TrialScheduler.STOP if candidate.pair in self._stopped_pairs else TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(controller, trial, result)
        if decision == TrialScheduler.STOP:
            self._stopped_pairs.add(candidate.pair)
        return decision


def _scheduler(config: RunConfig, steps: int, candidates: dict[str, Candidate], mode: str) -> TrialScheduler:
    asked = config.search.ray
    return _ByFirstSeed(
        config.search.seeds[0],
        candidates,
        time_attr="steps",
        metric="metric",
        mode=mode,
        max_t=steps,
        grace_period=_first_rung(config, steps),
        reduction_factor=asked.reduction_factor,
    )


def _first_rung(config: RunConfig, steps: int) -> int:
    return max(1, round(config.search.ray.grace_ratio * steps))


def rungs(config: RunConfig, steps: int) -> frozenset[int]:
    """Steps after which a candidate's metric is measured, to see whether it falls behind."""
    found, rung = set(), _first_rung(config, steps)
    while config.search.ray.early_stopping and rung < steps:
        found.add(rung)
        rung *= config.search.ray.reduction_factor
    return frozenset(found)


# What runs on the ranks.


@lru_cache(maxsize=1)
def _task(config: str) -> Task:
    return load_task(RunConfig.model_validate_json(config))


@lru_cache(maxsize=1)
def kept_base() -> KeptBase:
    """What this process keeps for its next job."""
    return KeptBase()


def _called(
    run: RunConfig,
    config: RunConfig,
    output: Path,
    work: Callable[..., T],
    args: tuple[Any, ...],
    client: SupervisorClient,
) -> T:
    with keeping(kept_base()):
        return work(config, _task(run.model_dump_json()), output, *args)


def _evaluated(
    config: RunConfig, output: Path, candidate: Candidate, client: SupervisorClient
) -> dict[str, Any] | None:
    """The record of a candidate; None where it was asked to pause."""
    task, done = _task(config.model_dump_json()), 0
    steps = training_steps(candidate.config(config).train, len(task.trained))

    def advance(n: int = 1) -> None:
        nonlocal done
        done += n
        client.say(step=done, of=steps)

    def resumed(n: int) -> None:
        client.say(earlier=n)
        advance(n)

    def report(step: int, metric: float) -> None:
        draw(step, selection=metric)
        client.report(step, metric)

    early = config.search.ray.early_stopping and candidate.round is not None
    with curves(output, candidate) as draw, keeping(kept_base()):
        control = Control(
            advance,
            client.pausing,
            rungs(config, steps) if early else frozenset(),
            seen=lambda step, loss, rate: draw(step, loss=loss, learning_rate=rate),
            resumed=resumed,
        )
        try:
            record = run_candidate(config, task, output, candidate, control, report if early else None)
        except Paused:
            return None
        if record["status"] == "ok":
            draw(steps, selection=record["metric"])
        return record


def _pause_all(supervisor: Any) -> None:
    """Have all jobs save their state and end, as far as they do so in time."""
    ray.get(supervisor.close.remote(True))
    deadline = time.monotonic() + PAUSE_S
    while not ray.get(supervisor.idle.remote()) and time.monotonic() < deadline:
        time.sleep(0.2)


def _described(node: dict[str, Any]) -> str:
    return f"{node['host']}: {node['has'].get('CPU', 0):g} CPUs, {node['has'].get('GPU', 0):g} GPUs"
