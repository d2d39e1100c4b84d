"""The model that Fisher passes see, with a new head that was trained for a while where that is asked for.

An untrained head knows nothing of the labels, so that a sample's gradient says little but how far its label is from
what such a head happens to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import failing_together, rank_and_world
from irdscale.errors import InputError
from irdscale.masks.mask import Mask
from irdscale.sparse import merge, sparsify
from irdscale.training.base_model import base_model
from irdscale.training.trainer import Control, fine_tune, trained_densely
from irdscale.utils.progress import bar

if TYPE_CHECKING:
    from irdscale.tasks import Task


@contextmanager
def model_to_score(config: RunConfig, task: Task, progress: bool) -> Iterator[tuple[nn.Module, list[str]]]:
    """The model for passes over samples, and the names of the parameters that are trained outside any mask.

    They are lent for the time of the body, as by `base_model`. The head is drawn by the first seed, and trained alone
    for `fisher.head_warmup` steps, as `train` says otherwise. Collective where torch.distributed is initialised.

    Raises:
        InputError: the configuration does not fit the model or the ranks, or there is no new head to train.
        RunError: the loss is no number, or a rank died.
    """
    steps, seed = config.fisher.head_warmup, config.search.seeds[0]
    with ExitStack() as lent:
        with failing_together():
            model, new = lent.enter_context(base_model(config, task, seed))
            dense = trained_densely(config, model, new)
            if steps and not new:
                raise InputError(
                    f"fisher.head_warmup: found {steps}; expected 0: the checkpoint holds all of the model, "
                    f"so there is no new head"
                )
        if steps:
            sparsify(model, Mask({}, {}), [f"^{re.escape(name)}$" for name in new])
            train = config.train.model_copy(update={"steps": steps, "epochs": None})
            with bar("Head", steps, enabled=progress and rank_and_world()[0] == 0) as advance:
                fine_tune(model, task, config.model_copy(update={"train": train}), seed, Control(advance))
            merge(model, dequantize=False)
        yield model, dense
