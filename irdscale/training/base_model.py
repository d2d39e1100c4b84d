"""The base model that a process loads once, and lends to one candidate or pass after the other.

Features: a new head is drawn by its seed as a load draws it; what was done to a model is undone when it comes back, bit
for bit, and its weights are compared; a model that is not as it was is loaded anew.

Constraints: outside `keeping` every model is a new one; so is one in ZeRO-3 partitions, whose weights are spread over
ranks and engines.
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
    """A place for one base model, which it keeps until another one is asked for, or `release`.

    Attributes:
        loads: number of times that a checkpoint was read.
    """

    def __init__(self) -> None:
        self.loads = 0
        self._held: _Held | None = None
        self._lent = False

    def release(self) -> None:
        """Forget the model."""
        self._held = None

    @contextmanager
    def lend(self, config: RunConfig, task: Task, seed: int) -> Iterator[tuple[PreTrainedModel, list[str]]]:
        """What `irdscale.tasks.build_model` returns, for the time of the body, after which the model is another's.

        Raises:
            InputError: as `build_model`.
        """
        if self._lent or zero_stage(config) == 3:
            self._held = None
            self.loads += 1
            yield build_model(config, task, seed)
            return
        held, key = self._held, _key(config, task)
        # While it is lent nobody keeps it, so that one that is not given back is gone.
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
            good = held.restore()
        except Exception as error:  # whatever it was, a load heals it
            log.debug("the base model could not be restored: %s", error)
            return
        if good:
            self._held = held
        else:
            log.debug("the base model is not what it was: it will be loaded anew")


class _Held:
    """A loaded model, what it was like, and how its new head is drawn."""

    def __init__(self, key: Any, model: PreTrainedModel, new: list[str], seed: int) -> None:
        self.key, self.model, self.new = key, model, new
        self._seed = seed
        self._first = {name: model.get_parameter(name).detach().clone() for name in new}
        self._head = new_head(model, new, seed) if new else None
        self._record = Recorded(model, without=new)
        self._hashes: dict[frozenset[str], str] = {}
        vouch(model, self._hashes)

    def draw(self, seed: int) -> bool:
        """Give the new head the values of this seed; False where only a load can."""
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
        """Undo what was done to the model; False where that cannot be, or the weights differ."""
        model, whole = self.model, dict[str, "Tensor"]()
        hashes: dict[frozenset[str], str] = {}
        if is_sparse(model):
            hashes, whole = known_hashes(model), dict(sparse_state(model).dense)
            unload(model)
        if not self._record.restore(whole) or not self._record.same_weights():
            return False
        # A hash with the head in it is one seed's.
        self._hashes |= {left_out: found for left_out, found in hashes.items() if left_out.issuperset(self.new)}
        return True


def _key(config: RunConfig, task: Task) -> Any:
    """What a loaded model depends on, besides the seed."""
    language = task.kind in LANGUAGE_KINDS
    head = None if language else (task.kind == "regression", task.num_labels, tuple(task.label_names))
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    checked = config.task.max_length, task.tokenizer.pad_token_id
    return config.model.model_dump_json(), head, device, checked


_CURRENT: ContextVar[KeptBase | None] = ContextVar("kept base", default=None)


@contextmanager
def keeping(kept: KeptBase) -> Iterator[None]:
    """Inside, `base_model` lends the model that `kept` keeps."""
    before = _CURRENT.set(kept)
    try:
        yield
    finally:
        _CURRENT.reset(before)


@contextmanager
def base_model(config: RunConfig, task: Task, seed: int) -> Iterator[tuple[PreTrainedModel, list[str]]]:
    """What `irdscale.tasks.build_model` returns, for the time of the body: lent inside `keeping`, a new one elsewhere.

    Whatever the body does to the model is undone. As `build_model`, collective with ZeRO-3.

    Raises:
        InputError: as `build_model`.
    """
    kept = _CURRENT.get()
    if kept is None:
        yield build_model(config, task, seed)
        return
    with kept.lend(config, task, seed) as lent:
        yield lent
