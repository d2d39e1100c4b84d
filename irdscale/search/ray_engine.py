"""The Ray engine: one Tuner per round, one trial per (candidate, seed) evaluation.

Trials run side by side as far as the cluster has room, each on one or several ranks, with or without DeepSpeed. A trial
that loses its process or node, or hangs, restarts from the last saved state of its training. ASHA can stop trials
early. Fisher passes and test scores run on the cluster too, so this process needs no GPU. It alone writes the ledger.

All nodes must share the output folder and find the model and the data at the paths of the configuration.

A trial (`irdscale.cluster.trial`) computes nothing: it asks the supervisor (`irdscale.cluster.supervisor`) to run a job
and waits. So worker processes outlive trials and keep their imports, and a hung one can be ended from outside.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
from ray import tune
from ray.tune.search import BasicVariantGenerator

from irdscale.cluster.connect import Cluster, answer, beside, check_nodes, connected, fitting, has_gpus, nodes
from irdscale.cluster.live_table import watching
from irdscale.cluster.share import cards, counted, is_share, share_of
from irdscale.cluster.supervisor import Job
from irdscale.cluster.trial import JobTrial
from irdscale.cluster.worker import RankGroup, packed, unpacked
from irdscale.config.schema import RunConfig, training_steps
from irdscale.errors import InputError, RunError
from irdscale.memory.gpu_sharing import AUTO_TRIALS, Sharing, describe, share_by_memory, sharing_of
from irdscale.search.candidates import Candidate
from irdscale.search.early_stopping import AshaByPair
from irdscale.search.ray_jobs import evaluate_candidate, run_work
from irdscale.search.runner import WorkItem

if TYPE_CHECKING:
    from irdscale.tasks import Task

T = TypeVar("T")
log = logging.getLogger(__name__)
# Time for trials to save their state when the search is interrupted.
PAUSE_S = 30.0


@contextmanager
def ray_engine(
    config: RunConfig, task: Task, output: Path, progress: bool, ratio: float | None = None
) -> Iterator[RayEngine]:
    """Connect to the cluster, check its nodes and run the body; on an interrupt, trials save their state first.

    Args:
        ratio: share of the parameters that the largest training trains; `search.ratio` if None.

    Raises:
        InputError: there is no cluster, a node does not share the output folder, a trial cannot fit, or trials that
            share a GPU need more memory than it has.
    """
    with connected() as cluster:
        check_nodes(output)
        config, shared = sharing(config, task, ratio)
        steps = training_steps(config.train, len(task.trained))
        engine = RayEngine(config, steps, output, cluster, lower_is_better=task.lower_is_better)
        if shared is not None:
            log.log(logging.WARNING if shared.fits is False else logging.INFO, describe(shared))
        with watching(cluster.supervisor, enabled=progress):
            try:
                yield engine
            except KeyboardInterrupt:
                log.info("interrupted: trials save their state (interrupt again to end at once)")
                _pause_all(cluster.supervisor)
                raise


def rank_group_of(config: RunConfig, ranks: int, exclusive: bool = False) -> RankGroup:
    """The ranks of one job on the connected cluster.

    Args:
        exclusive: each rank has a GPU to itself, even where trials share one.
    """
    asked = config.search.ray
    given = asked.gpus_per_rank
    gpus: float = given if isinstance(given, int | float) else int(has_gpus())
    if is_share(gpus):
        gpus = 1 if exclusive else counted(gpus)
    grouped = config.train.deepspeed is not None
    return RankGroup(ranks, asked.cpus_per_rank, gpus, asked.placement == "spread", grouped, config.distributed)


def sharing(config: RunConfig, task: Task, ratio: float | None = None) -> tuple[RunConfig, Sharing | None]:
    """How trials share the GPUs of the connected cluster; None if they do not.

    Args:
        ratio: share of the parameters that the largest training trains; `search.ratio` if None.

    Returns:
        The configuration, with a number for `search.ray.gpus_per_rank: auto`, and the sharing.

    Raises:
        InputError: they need more memory than the smallest GPU has.
    """
    given = config.search.ray.gpus_per_rank
    if given == "auto":
        found = cards(share_of(AUTO_TRIALS))
        gpus = share_by_memory(config, found, task.longest, ratio) if has_gpus() else 0
        asked = config.search.ray.model_copy(update={"gpus_per_rank": gpus})
        config = config.model_copy(update={"search": config.search.model_copy(update={"ray": asked})})
        # This share holds the largest training already.
        ratio = None
    share = rank_group_of(config, config.search.ray.ranks).gpus
    if not is_share(share):
        return config, None
    return config, sharing_of(config, share, found if given == "auto" else cards(share), task.longest, ratio)


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
        """Check that trials and Fisher passes fit on the cluster.

        Args:
            steps: optimizer steps of one training.
            lower_is_better: whether the selection metric improves downwards.

        Raises:
            InputError: they do not fit, and no nodes can join the cluster.
        """
        self._config, self._steps, self._output, self._cluster = config, steps, output.absolute(), cluster
        self._lower_is_better, asked = lower_is_better, config.search.ray
        self._trial = rank_group_of(config, asked.ranks)
        # Fisher sums take more memory than a trial, and no trial runs beside them.
        self._fisher = rank_group_of(config, asked.fisher_ranks or asked.ranks, exclusive=True)
        for key, rank_group in (("ranks", self._trial), ("fisher_ranks", self._fisher)):
            if fitting(rank_group) == 0:
                problem = (
                    f"found {rank_group.size} x {rank_group.cpus} CPUs and {rank_group.gpus:g} GPUs, which do not fit "
                    f"on the cluster ({'; '.join(map(_described, nodes()))})"
                )
                if cluster.own:
                    raise InputError(problem, "less, or a larger cluster", key=f"search.ray.{key}")
                log.warning("search.ray.%s: %s; waiting for nodes to join", key, problem)

    def call(self, work: Callable[..., T], *args: Any) -> T:
        (result,) = self.call_all([WorkItem(work, args)])
        return cast(T, result)

    def call_all(
        self,
        calls: Sequence[WorkItem],
        ended: Callable[[int, Any], None] = lambda place, result: None,
        starting: Callable[[int], None] | None = None,
    ) -> list[Any]:
        asked, supervisor = self._config.search.ray, self._cluster.supervisor
        results: list[Any] = [None] * len(calls)
        failures, left, following = [0] * len(calls), deque(range(len(calls))), dict[Any, int]()
        # The items of a comparison's call are alike.
        fits = fitting(self._ranks_of(calls[0])) if starting is not None and calls else len(calls)
        room, refusal = max(1, min(fits, asked.concurrent or fits)), None
        try:
            while following or (left and refusal is None):
                while left and refusal is None and len(following) < room:
                    refusal = _refusal(starting, left[0])
                    if refusal is None:
                        place = left.popleft()
                        following[self._begin(calls, place)] = place
                # The timeout lets an interrupt through.
                for over in ray.wait(list(following), timeout=1.0)[0] if following else ():
                    place = following.pop(over)
                    try:
                        results[place] = unpacked(answer(over)["result"])
                    except RunError as lost:
                        failures[place] += 1
                        if failures[place] > asked.max_failures:
                            raise
                        log.warning("%s: %s; restarting it", _described_item(calls, place), lost)
                        left.append(place)
                        continue
                    ended(place, results[place])
        except Exception:
            for place in following.values():
                answer(supervisor.stop.remote(_name(calls, place)))
            raise
        if refusal is not None:
            raise refusal
        return results

    def _begin(self, calls: Sequence[WorkItem], place: int) -> Any:
        """Start a work item; returns Ray's reference to its end."""
        call, supervisor, silent_s = calls[place], self._cluster.supervisor, 60 * self._config.search.ray.silent_minutes
        work = partial(run_work, self._config, call.config or self._config, self._output, call.work, call.args)
        label = {"what": _described_item(calls, place)}
        job = Job(_name(calls, place), packed(work), self._ranks_of(call), silent_s, label=label)
        answer(supervisor.start.remote(job))
        return supervisor.follow.remote(_name(calls, place))

    def _ranks_of(self, call: WorkItem) -> RankGroup:
        return self._trial if call.light and is_share(self._trial.gpus) else self._fisher

    def evaluate(
        self,
        candidates: Sequence[Candidate],
        ended: Callable[[dict[str, Any]], None],
        starting: Callable[[Candidate], None] | None = None,
    ) -> None:
        asked, supervisor = self._config.search.ray, self._cluster.supervisor
        by_name = {candidate.key(self._config): candidate for candidate in candidates}
        records = _RecordWriter(self._config, by_name, ended, supervisor, starting)
        fits = fitting(self._trial)
        # A trial that Ray queues has started for Tune.
        room = fits if self._cluster.own or starting is not None else max(fits, len(candidates))
        room = max(1, min(room, asked.concurrent or room, len(candidates)))
        # Baselines (round None) do not compete with each other.
        early = asked.early_stopping and all(candidate.round is not None for candidate in candidates)
        jobs = {name: self._job(name, candidate) for name, candidate in by_name.items()}
        ray.get(supervisor.close.remote(False))
        with tempfile.TemporaryDirectory(prefix="irdscale-tune-") as scratch:
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(JobTrial, supervisor=supervisor, jobs=jobs),
                    tune.PlacementGroupFactory([beside() or {"memory": 1}]),
                ),
                param_space={"name": tune.grid_search(list(jobs))},
                tune_config=tune.TuneConfig(
                    trial_dirname_creator=lambda trial: trial.trial_id,
                    scheduler=AshaByPair(self._config, self._steps, by_name, self._lower_is_better) if early else None,
                    reuse_actors=True,
                    search_alg=_AskedTrials(records.may_start, room),
                ),
                run_config=tune.RunConfig(
                    name="round",
                    storage_path=scratch,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=asked.max_failures),
                    callbacks=[records],
                ),
            )
            tuner.fit()
        ended_by = records.error or records.refusal
        if ended_by is not None:
            raise ended_by

    def _job(self, name: str, candidate: Candidate) -> Job:
        asked = self._config.search.ray
        return Job(
            name,
            packed(partial(evaluate_candidate, self._config, self._output, candidate)),
            self._trial,
            silent_s=60 * asked.silent_minutes,
            limit_s=None if asked.trial_minutes is None else 60 * asked.trial_minutes,
            label={"round": candidate.round, "what": str(candidate)},
        )


def _refusal(starting: Callable[[T], None] | None, what: T) -> Exception | None:
    """The error that `starting` raises; None if this may start."""
    try:
        if starting is not None:
            starting(what)
    except Exception as refusal:
        return refusal
    return None


def _name(calls: Sequence[WorkItem], place: int) -> str:
    return f"{calls[place].work.__name__}-{place}"


def _described_item(calls: Sequence[WorkItem], place: int) -> str:
    """A work item as logs and the live table show it."""
    words = calls[place].work.__name__.replace("_", " ")
    return words if len(calls) == 1 else f"{words}, {place + 1} of {len(calls)}"


class _AskedTrials(BasicVariantGenerator):
    """Tune's trials, which start while `may_start` agrees to the name of the next job, at most `room` at once."""

    def __init__(self, may_start: Callable[[str], bool], room: int) -> None:
        super().__init__(max_concurrent=room)
        self._may_start = may_start

    def next_trial(self) -> Any:
        trial = super().next_trial()
        if trial is None or self._may_start(trial.config["name"]):
            return trial
        self.set_finished()
        return None


class _RecordWriter(tune.Callback):
    """Hands the record of each finished trial to `ended`, in this process, and asks `starting` before each one.

    Attributes:
        error: error that ends the search; None if there is none.
        refusal: error that `starting` raised; None if all may start.
    """

    def __init__(
        self,
        config: RunConfig,
        candidates: dict[str, Candidate],
        ended: Callable[[dict[str, Any]], None],
        supervisor: Any,
        starting: Callable[[Candidate], None] | None,
    ) -> None:
        self._config, self._candidates, self._ended, self._supervisor = config, candidates, ended, supervisor
        self._starting = starting
        self.error: Exception | None = None
        self.refusal: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks to restore experiments, which this package never does.
        return {}

    def may_start(self, name: str) -> bool:
        """Whether this trial may start; after a refusal, running ones go on."""
        self.refusal = self.refusal or _refusal(self._starting, self._candidates[name])
        return self.error is None and self.refusal is None

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result, name = trial.last_result or {}, trial.config["name"]
        if "bad_input" in result:
            self._fail(InputError(result["bad_input"]))
        elif "result" in result:
            # None if it was paused.
            if result["result"] is not None:
                self._end(result["result"])
        else:
            step, seconds = result.get("steps", 0), round(result.get("time_total_s", 0.0), 3)
            error = f"stopped early at step {step}, with {result.get('metric', math.nan):.4f}"
            stopped = {"error": error, "stopped_at": step, "seconds": seconds}
            self._end(self._candidates[name].record(self._config) | stopped)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["name"]
        text = ray.get(self._supervisor.why.remote(name)) or "the trial's process or node was lost"
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


def _pause_all(supervisor: Any) -> None:
    """Ask all jobs to save their state and end; wait for them at most PAUSE_S seconds."""
    ray.get(supervisor.close.remote(True))
    deadline = time.monotonic() + PAUSE_S
    while not ray.get(supervisor.idle.remote()) and time.monotonic() < deadline:
        time.sleep(0.2)


def _described(node: dict[str, Any]) -> str:
    return f"{node['host']}: {node['has'].get('CPU', 0):g} CPUs, {node['has'].get('GPU', 0):g} GPUs"
