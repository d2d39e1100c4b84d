"""Early stopping of a round's trainings by ASHA, pair by pair."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from irdscale.config.schema import RunConfig
from irdscale.search.candidates import Candidate
from irdscale.search.ird import Pair
from irdscale.search.ray_jobs import first_rung


class AshaByPair(AsyncHyperBandScheduler):
    """ASHA over the trials of the first seed; trials of other seeds stop when their pair is stopped.

    A pair counts only if all its seeds finish, so seeds are not stopped one by one.

    Args:
        steps: optimizer steps of one training.
        candidates: job name -> candidate.
    """

    def __init__(self, config: RunConfig, steps: int, candidates: dict[str, Candidate], lower_is_better: bool) -> None:
        super().__init__(
            time_attr="steps",
            metric="metric",
            mode="min" if lower_is_better else "max",
            max_t=steps,
            grace_period=first_rung(config, steps),
            reduction_factor=config.search.ray.reduction_factor,
        )
        self._seed, self._candidates, self._stopped_pairs = config.search.seeds[0], candidates, set[Pair]()

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        candidate = self._candidates[trial.config["name"]]
        if candidate.seed != self._seed:
            return TrialScheduler.STOP if candidate.pair in self._stopped_pairs else TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(controller, trial, result)
        if decision == TrialScheduler.STOP:
            self._stopped_pairs.add(candidate.pair)
        return decision
