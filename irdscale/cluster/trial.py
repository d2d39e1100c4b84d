"""A supervisor's job as a Ray Tune trial, which computes nothing: it asks the supervisor to run the job, and waits.

This module must not import torch, even indirectly: trials are new processes, which should start fast.
"""

from __future__ import annotations

from typing import Any

import ray
from ray import tune

from irdscale.cluster.connect import answer
from irdscale.cluster.supervisor import Job
from irdscale.cluster.worker import unpacked
from irdscale.errors import InputError


class JobTrial(tune.Trainable):
    """Hands a job's reports to Tune as {"steps", "metric"}, and its end as {"result"} or {"bad_input"}."""

    def setup(self, config: dict[str, Any], supervisor: Any, jobs: dict[str, Job]) -> None:
        self._supervisor, self._jobs, self._started = supervisor, jobs, False
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._job = self._jobs[new_config["name"]]
        self._seen = 0
        return True

    def step(self) -> dict[str, Any]:
        try:
            if not self._started:
                answer(self._supervisor.start.remote(self._job))
                self._started = True
            reply = answer(self._supervisor.follow.remote(self._job.name, self._seen))
        except InputError as error:
            return {"done": True, "bad_input": str(error)}
        if "report" in reply:
            self._seen += 1
            step, metric = reply["report"]
            return {"steps": step, "metric": metric}
        return {"done": True, "result": unpacked(reply["result"])}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: a job saves its own state and resumes from it."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass

    def cleanup(self) -> None:
        if self._started:
            self._started = False
            ray.get(self._supervisor.stop.remote(self._job.name))
