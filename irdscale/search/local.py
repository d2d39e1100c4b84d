"""The local runner: one evaluation after the other, in this process, or by all ranks together."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from irdscale.config import RunConfig
from irdscale.errors import InputError, RunError, TrainingError
from irdscale.evaluation import evaluate_model
from irdscale.mask import Mask
from irdscale.ranks import first_says, rank_and_world
from irdscale.search.ird import Pair, best_of
from irdscale.search.ledger import evaluation_key
from irdscale.search.masks import mask_folder
from irdscale.search.shared import SharedLedger
from irdscale.sparse import load_adapter, save_adapter
from irdscale.tasks import build_model
from irdscale.training import adapter_config, fine_tune, sparse_model
from irdscale.training_state import remove_training

if TYPE_CHECKING:
    from irdscale.tasks import Task

log = logging.getLogger(__name__)
NO_MASK = "none"


class LocalRunner:
    """Evaluates (mask, seed) candidates and journals them; what the ledger holds is not run again.

    Attributes:
        asked: keys of the evaluations that this search needs, in the order in which they were first asked for.
        reused: how often an evaluation was asked for again, by another pair with the same mask.
        metrics: (pair, seed) -> selection metric of every candidate of the search that ended well.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        ledger: SharedLedger,
        output: Path,
        advance: Callable[..., None] | None = None,
    ) -> None:
        self._config, self._task, self._ledger, self._output = config, task, ledger, output
        self._advance = advance or (lambda n=1, note="": None)
        self.asked: list[str] = []
        self.reused = 0
        self.metrics: dict[tuple[Pair, int], float] = {}

    def evaluate_round(
        self, round_number: int, wanted: list[tuple[Pair, int]], masks: dict[Pair, str]
    ) -> list[float | None]:
        """Evaluate the candidates of a round; None for one that failed. Keeps the leader's adapters, drops the rest."""
        direction = self._config.search.direction
        metrics = []
        for pair, seed in wanted:
            metric = self.evaluate(masks[pair], pair, seed, round_number, direction)
            if metric is not None:
                self.metrics[pair, seed] = metric
            metrics.append(metric)
        self._drop_followers(masks)
        return metrics

    def evaluate(
        self, mask_hash: str | None, pair: Pair, seed: int, round_number: int | None, direction: str
    ) -> float | None:
        """The selection metric of one mask and seed, from the ledger or by training it; None if it failed."""
        key = self.key(mask_hash, seed)
        if key in self.asked:
            self.reused += 1
        else:
            self.asked.append(key)
        if key not in self._ledger.finished:
            self._ledger.append(self._run(key, mask_hash, pair, seed, round_number, direction))
        self._advance(note=f"{pair.samples} samples, {pair.params} parameters, seed {seed}")
        return self.metric(mask_hash, seed)

    def metric(self, mask_hash: str | None, seed: int) -> float | None:
        """The selection metric of a finished evaluation; None if it is not among them."""
        record = self._ledger.finished.get(self.key(mask_hash, seed))
        return None if record is None else record["metric"]

    def error(self, mask_hash: str | None, seed: int) -> str | None:
        """What the last failed try of an evaluation died of."""
        key = self.key(mask_hash, seed)
        failed = [record["error"] for record in self._ledger.records if record["key"] == key]
        return failed[-1] if failed else None

    def key(self, mask_hash: str | None, seed: int) -> str:
        """What tells this evaluation from others."""
        return evaluation_key(mask_hash or NO_MASK, self._config.train.model_dump(mode="json"), seed)

    def trained(self, mask_hash: str | None, seed: int) -> nn.Module:
        """The trained model of a finished evaluation, from its adapter, or trained again where that was dropped."""
        folder = self._folder(self.key(mask_hash, seed))
        if first_says(folder.exists()):
            return load_adapter(build_model(self._config, self._task, seed)[0], folder)
        model = self._train(mask_hash, seed)
        save_adapter(model, folder, config=adapter_config(self._config, seed))
        return model

    def clear(self) -> None:
        """Drop the adapters of all evaluations; the winner's has its own place."""
        _remove(self._output / "candidates")

    def seconds(self) -> float:
        """Seconds that the asked evaluations took, in whichever process."""
        return sum(self._ledger.finished[key]["seconds"] for key in self.asked if key in self._ledger.finished)

    def _train(self, mask_hash: str | None, seed: int) -> nn.Module:
        mask = None if mask_hash is None else Mask.load(mask_folder(self._output, mask_hash))
        model = sparse_model(self._config, self._task, mask, seed)
        fine_tune(model, self._task, self._config, seed, state=self._state(mask_hash, seed))
        return model

    def _run(
        self, key: str, mask_hash: str | None, pair: Pair, seed: int, round_number: int | None, direction: str
    ) -> dict[str, Any]:
        started = time.perf_counter()
        record: dict[str, Any] = {
            "round": round_number,
            "samples": pair.samples,
            "params": pair.params,
            "seed": seed,
            "direction": direction,
            "mask": mask_hash,
            "metric": None,
            "status": "failed",
            "error": None,
            "key": key,
        }
        model = None
        try:
            model = self._train(mask_hash, seed)
            split, size = self._task.selection, self._config.train.eval_batch_size
            metric = evaluate_model(model, self._task, split, size)[self._task.metric]
            if not math.isfinite(metric):
                raise TrainingError(f"the {self._task.metric} on the selection split is {metric}")
            record |= {"metric": metric, "status": "ok"}
        except Exception as error:  # whatever one candidate dies of, the others go on
            agreed = isinstance(error, TrainingError)
            if isinstance(error, InputError | RunError) and not agreed:
                raise
            # What one rank alone dies of leaves the others waiting for it.
            if rank_and_world()[1] > 1 and not agreed:
                raise
            record["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning(
                "%d samples, %d parameters, seed %d failed: %s", pair.samples, pair.params, seed, record["error"]
            )
        if model is not None and record["status"] == "ok":
            save_adapter(model, self._folder(key), config=adapter_config(self._config, seed))
        remove_training(self._state(mask_hash, seed))
        return record | {"seconds": round(time.perf_counter() - started, 3)}

    def _state(self, mask_hash: str | None, seed: int) -> Path:
        return self._output / "candidates" / f"state-{self.key(mask_hash, seed)}"

    def _folder(self, key: str) -> Path:
        return self._output / "candidates" / key

    def _drop_followers(self, masks: dict[Pair, str]) -> None:
        seeds = self._config.search.seeds
        means = {
            pair: sum(self.metrics[pair, seed] for seed in seeds) / len(seeds)
            for pair in {pair for pair, _ in self.metrics}
            if all((pair, seed) in self.metrics for seed in seeds)
        }
        if not means:
            return
        leader = best_of(means)
        kept = {self.key(masks[leader], seed) for seed in seeds}
        for pair, seed in self.metrics:
            key = self.key(masks[pair], seed)
            if key not in kept:
                _remove(self._folder(key))


def _remove(folder: Path) -> None:
    if rank_and_world()[0] == 0:
        shutil.rmtree(folder, ignore_errors=True)
