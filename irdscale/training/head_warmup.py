"""The model of the Fisher passes, with a new head trained for `fisher.head_warmup` steps.

An untrained head predicts at random, so a sample's gradient depends mostly on how far its label is from that
prediction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from irdscale.config.schema import RunConfig, short_training
from irdscale.distributed.ranks import failing_together, rank_and_world
from irdscale.errors import InputError
from irdscale.masks.mask import Mask
from irdscale.sparse import merge, sparsify
from irdscale.training.base_model import base_model
from irdscale.training.control import shown
from irdscale.training.trainable import trained_densely
from irdscale.training.trainer import fine_tune
from irdscale.utils.progress import bar

if TYPE_CHECKING:
    from irdscale.tasks import Task


@contextmanager
def model_to_score(config: RunConfig, task: Task, progress: bool) -> Iterator[tuple[nn.Module, list[str]]]:
    """The model for passes over samples, and the names of the parameters that are trained outside any mask.

    The model is lent for the time of the body, as by `base_model`. The head is initialised by the first seed, and it
    alone is trained, for `fisher.head_warmup` steps with the settings of `train`. Collective where torch.distributed is
    initialised.

    Raises:
        InputError: the configuration does not fit the model or the ranks, or there is no new head to train.
        RunError: the loss is NaN or infinite, or a rank died.
    """
    steps, seed = config.fisher.head_warmup, config.search.seeds[0]
    with ExitStack() as lent:
        with failing_together():
            model, new = lent.enter_context(base_model(config, task, seed))
            dense = trained_densely(config, model, new)
            if steps and not new:
                raise InputError(
                    f"found {steps}", "0, because the checkpoint holds the head too", key="fisher.head_warmup"
                )
        if steps:
            sparsify(model, Mask({}, {}), [f"^{re.escape(name)}$" for name in new])
            short = config.model_copy(update={"train": short_training(config.train, steps)})
            with bar("Head", steps, enabled=progress and rank_and_world()[0] == 0) as advance:
                fine_tune(model, task, short, seed, shown(advance))
            merge(model, dequantize=False)
        yield model, dense
