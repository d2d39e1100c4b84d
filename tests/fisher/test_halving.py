"""Batches that do not fit in memory."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from irdscale.errors import InputError
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.accumulate import new_sums
from tests.fisher.oracle import EXACT, accumulate, assert_same, brute_force, fallbacks
from tests.tiny_models import collate, samples, tiny


def test_a_batch_that_does_not_fit_is_halved_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model, rows = tiny("bert"), samples()
    expected, traces = brute_force(model, rows)
    tight = Tight(model, room=3)
    gradients = SampleGradients(tight, rows, collate, scored_parameters(tight), batch_size=8)
    sums = new_sums(gradients, range(8), dtype=torch.float64)
    found = torch.zeros(8, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        gradients.accumulate(range(8), sums, found)
        gradients.add_traces(range(8), torch.zeros(8, dtype=torch.float64))
    said = [f"fisher.batch_size: {size} does not fit in memory; continuing with {size // 2}" for size in (8, 4)]
    assert fallbacks(caplog) == said
    assert_same({n.removeprefix("model."): s / 8 for n, s in sums.tensors.items()}, expected)
    torch.testing.assert_close(found, traces, **EXACT)
    assert gradients.taken == 16
    with pytest.raises(InputError, match="a batch of 1 does not fit in memory"):
        accumulate(Tight(model, room=0), rows)


class Tight(nn.Module):
    """Runs out of memory in the middle of the backward pass of a batch that is too large."""

    def __init__(self, model: Any, room: int) -> None:
        super().__init__()
        self.model, self.room, self.config = model, room, model.config

    def forward(self, **inputs: Any) -> Any:
        def check(_module: Any, _args: Any, output: Any) -> None:
            def fail(gradient: Tensor) -> None:
                if len(gradient) > self.room:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad and torch.is_grad_enabled():
                hidden.register_hook(fail)

        handle = self.model.bert.encoder.layer[0].register_forward_hook(check)
        try:
            return self.model(**inputs)
        finally:
            handle.remove()
