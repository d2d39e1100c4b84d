"""Trackers of `train.report_to`: TensorBoard, Weights & Biases, MLflow, Trackio, by the integrations of transformers.

Their own environment variables hold (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...). Only rank 0 reports. A tracker that
cannot start is an error before the first step. One that fails later is dropped with a warning; the training goes on.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from irdscale.config.schema import RunConfig
from irdscale.errors import InputError

# Tracker -> the package to install for it.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
KEY = "train.report_to"
log = logging.getLogger(__name__)


def missing_trackers(config: RunConfig) -> dict[str, str]:
    """Tracker -> package to install, of each in `train.report_to` that cannot be imported."""
    if not config.train.report_to:
        return {}
    from transformers import integrations

    return {
        name: PACKAGES[name] for name in config.train.report_to if not getattr(integrations, f"is_{name}_available")()
    }


def require_trackers(config: RunConfig) -> None:
    """Check that the packages of `train.report_to` are installed.

    Raises:
        InputError: one is missing; names all to install.
    """
    missing = missing_trackers(config)
    if missing:
        fault = f"found {', '.join(missing)} without the package{'s' * (len(missing) > 1)}"
        raise InputError(fault, f"pip install {' '.join(missing.values())}", KEY)


class Trackers:
    """The trackers of one training, on rank 0.

    Args:
        names: trackers.
        folder: folder of TensorBoard's files.
        done: steps that an earlier run made; later ones of it are hidden in TensorBoard.
    """

    def __init__(self, names: list[str], folder: Path, done: int) -> None:
        self._names, self._folder, self._done = names, folder, done
        self._running: dict[str, Any] = {}
        self._call: tuple[Any, ...] = ()
        self._own_wandb = False

    def begin(self, args: Any, state: Any, control: Any, model: Any) -> None:
        """Start a run in each tracker, named `args.run_name`.

        Raises:
            InputError: a tracker cannot start.
        """
        self._call = args, state, control, model
        for name in self._names:
            try:
                if name == "wandb":
                    import wandb

                    self._own_wandb = wandb.run is None
                tracker = _integration(name, self._folder, self._done)
                tracker.on_train_begin(args, state, control, model=model)
                self._running[name] = tracker
            except Exception as error:
                problem = (str(error).splitlines() or [type(error).__name__])[0]
                raise InputError(f"{name} cannot start: {problem}", f"a working {name}, or none", KEY) from error

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Report the metrics of a step."""
        if not self._running:
            return
        args, state, control, model = self._call
        # The step was made some time ago, perhaps by an earlier run.
        state = copy.copy(state)
        state.global_step = step
        self._each(lambda tracker: tracker.on_log(args, state, control, logs=dict(metrics), model=model))

    def end(self) -> None:
        """End the runs, also those of a training that failed."""
        if not self._running:
            return
        args, state, control, model = self._call
        self._each(lambda tracker: tracker.on_train_end(args, state, control, model=model))
        if "wandb" in self._running and self._own_wandb:
            # Its integration would log the next training into the same run.
            import wandb

            self._each(lambda tracker: wandb.finish(), only="wandb")
        self._running = {}

    def _each(self, work: Callable[[Any], Any], only: str | None = None) -> None:
        for name in [name for name in self._running if only in (None, name)]:
            try:
                work(self._running[name])
            except Exception as error:  # a lost network must not end a training
                problem = (str(error).splitlines() or [type(error).__name__])[0]
                log.warning("%s: %s failed, and gets no more metrics: %s", KEY, name, problem)
                del self._running[name]


def _integration(name: str, folder: Path, done: int) -> Any:
    """The callback of transformers for a tracker."""
    from transformers import integrations

    if name != "tensorboard":
        (found,) = integrations.get_reporting_integration_callbacks([name])
        return found()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter  # type: ignore[no-redef]
    # Two files of one second would have the same name.
    writer: Any = SummaryWriter(str(folder), purge_step=done + 1 if done else None, filename_suffix=f".after-{done}")
    return integrations.TensorBoardCallback(writer)
