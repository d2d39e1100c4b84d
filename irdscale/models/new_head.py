"""New initial values, by another seed, for parameters that a checkpoint lacks, without loading it again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NewHead:
    """Initialises the missing parameters as `from_pretrained` does, in its order, by a seed.

    It keeps a copy of the model on the CPU whose other parameters are empty, so the values depend neither on the
    model's device nor on later changes of the model.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        """Copy a model right after loading.

        Args:
            names: names of the parameters that the checkpoint lacks
        """
        self._names = list(names)
        empty: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
            for name, p in model.named_parameters()
            if name not in names
        }
        self._copy: Any = copy.deepcopy(model, empty)

    def drawn(self, seed: int) -> dict[str, Tensor]:
        """name -> initial value on the CPU; NaN where the model does not initialise it."""
        # transformers initialises whatever does not have this mark.
        for module in self._copy.modules():
            vars(module).pop("_is_hf_initialized", None)
        for buffer in self._copy.buffers():
            buffer._is_hf_initialized = True
        for name, parameter in self._copy.named_parameters():
            parameter._is_hf_initialized = name not in self._names
        parameters = {name: self._copy.get_parameter(name) for name in self._names}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for parameter in parameters.values():
                parameter.fill_(torch.nan)
            torch.manual_seed(seed)
            self._copy.initialize_weights()
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def new_head(model: PreTrainedModel, names: Sequence[str], seed: int) -> NewHead | None:
    """The `NewHead` of a model just loaded with a seed; None if it does not reproduce the loaded values bit for bit."""
    try:
        head = NewHead(model, names)
        drawn = head.drawn(seed)
    except Exception:  # a model's own code may fail in any way outside loading
        return None
    same = all(torch.equal(value, model.get_parameter(name).detach().cpu()) for name, value in drawn.items())
    return head if same else None
