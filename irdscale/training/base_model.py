"""The base model that a process loads once and reuses for all candidates and passes.

Features: a seed initialises the new head exactly as a load does; changes to the model are undone after each use, bit
for bit, and its weights are compared; a model that differs afterwards is loaded again.

Constraints: outside `keeping` every call loads the model; so does ZeRO-3, whose partitions belong to one training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from irdscale.adapters.base import known_hashes, vouch
from irdscale.config.kinds import LANGUAGE_KINDS
from irdscale.config.schema import RunConfig
from irdscale.distributed.deepspeed import zero_stage
from irdscale.distributed.zero3 import device_of
from irdscale.models.build import build_model
from irdscale.models.new_head import new_head
from irdscale.models.recorded import Recorded
from irdscale.sparse import sparse_state, unload
from irdscale.sparse.model import is_sparse

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from irdscale.tasks import Task

log = logging.getLogger(__name__)


class KeptBase:
    """Keeps one base model until another one is requested, or `release`.

    Attributes:
        loads: number of checkpoint loads.
    """

    def __init__(self) -> None:
        self.loads = 0
        self._held: _Held | None = None
        self._lent = False

    def release(self) -> None:
        """Drop the model."""
        self._held = None

    @contextmanager
    def lend(self, config: RunConfig, task: Task, seed: int) -> Iterator[tuple[PreTrainedModel, list[str]]]:
        """`irdscale.models.build.build_model`'s result, for the time of the body.

        Raises:
            InputError: as `build_model`.
        """
        if self._lent or zero_stage(config) == 3:
            self._held = None
            self.loads += 1
            yield build_model(config, task, seed)
            return
        held, key = self._held, _key(config, task)
        # The model is not kept while it is lent, so one that fails to come back is dropped.
        self._held = None
        if held is None or held.key != key or not held.draw(seed):
            held = None
            self.loads += 1
            log.debug("load %d of %s", self.loads, config.model.path)
            held = _Held(key, *build_model(config, task, seed), seed)
        self._lent = True
        try:
            yield held.model, list(held.new)
        except Exception:
            self._take_back(held)
            raise
        else:
            self._take_back(held)
        finally:
            self._lent = False

    def _take_back(self, held: _Held) -> None:
        try:
            self._held = held if held.restore() else None
        except Exception as error:  # a load repairs any fault
            log.debug("the base model could not be restored: %s", error)


class _Held:
    """A loaded model, a record of its original state, and the initialisation of its new head."""

    def __init__(self, key: Any, model: PreTrainedModel, new: list[str], seed: int) -> None:
        self.key, self.model, self.new = key, model, new
        self._seed = seed
        self._first = {name: model.get_parameter(name).detach().clone() for name in new}
        self._head = new_head(model, new, seed) if new else None
        self._record = Recorded(model, without=new)
        self._hashes: dict[frozenset[str], str] = {}
        vouch(model, self._hashes)

    def draw(self, seed: int) -> bool:
        """Initialise the new head by this seed; False if only a load can."""
        if seed == self._seed:
            values = self._first
        elif self._head is not None:
            values = self._head.drawn(seed)
        elif self.new:
            return False
        else:
            values = {}
        device = device_of(self.model)
        fresh = {name: value.to(device, copy=True) for name, value in values.items()}
        if not self._record.restore(fresh):
            return False
        vouch(self.model, self._hashes)
        return True

    def restore(self) -> bool:
        """Undo all changes to the model; False if that is impossible or the weights differ."""
        model, dense = self.model, dict[str, "Tensor"]()
        hashes: dict[frozenset[str], str] = {}
        if is_sparse(model):
            hashes, dense = known_hashes(model), dict(sparse_state(model).dense)
            unload(model)
        if not self._record.restore(dense) or not self._record.same_weights():
            return False
        # A hash that includes the head holds for one seed only.
        self._hashes |= {left_out: found for left_out, found in hashes.items() if left_out.issuperset(self.new)}
        return True


def _key(config: RunConfig, task: Task) -> Any:
    """Everything but the seed that a loaded model depends on."""
    language = task.kind in LANGUAGE_KINDS
    head = None if language else (task.kind == "regression", task.num_labels, tuple(task.label_names))
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    checked = config.task.max_length, task.tokenizer.pad_token_id
    return config.model.model_dump_json(), head, device, checked


_CURRENT: ContextVar[KeptBase | None] = ContextVar("kept base", default=None)


@contextmanager
def keeping(kept: KeptBase) -> Iterator[None]:
    """In the body, `base_model` lends the model that `kept` keeps."""
    before = _CURRENT.set(kept)
    try:
        yield
    finally:
        _CURRENT.reset(before)


@contextmanager
def base_model(config: RunConfig, task: Task, seed: int) -> Iterator[tuple[PreTrainedModel, list[str]]]:
    """`irdscale.models.build.build_model`'s result, for the time of the body: reused inside `keeping`, else loaded.

    Changes to a reused model are undone after the body. Collective with ZeRO-3, as `build_model`.

    Raises:
        InputError: as `build_model`.
    """
    kept = _CURRENT.get()
    if kept is None:
        yield build_model(config, task, seed)
        return
    with kept.lend(config, task, seed) as lent:
        yield lent
