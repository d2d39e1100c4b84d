"""The Fisher pass of a language model on a GPU, and the losses of its head."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irdscale.bench import gpu_models
from irdscale.bench.gpu_models import MATRICES, SIZES, collate, make_model, make_rows, on_device, synchronised, wait
from irdscale.bench.timing import figure, row, side_by_side
from irdscale.fisher import SampleGradients, scored_parameters
from irdscale.fisher.accumulate import new_sums
from irdscale.models.chunked_losses import found_losses, next_tokens

PASS_BAR = 1.15
FIRST_BAR = 3.0
# Milliseconds for 2 x 2 x 10^12 operations: 4096 tokens, a vocabulary of 128k, a width of 2048.
LOSSES_BAR = 20.0
SAMPLES = 32
REPEATS = 5


def fisher_rows(name: str) -> Iterator[dict[str, Any]]:
    """A second Fisher pass over forward + backward of the same batches, and the excess of the first pass."""
    size = SIZES[name]
    model, data = make_model(size), make_rows(size, SAMPLES)
    scored = scored_parameters(model, include=MATRICES)
    batches = [on_device(data[start : start + size.batch]) for start in range(0, SAMPLES, size.batch)]
    samples = SampleGradients(model, data, collate, scored, batch_size=size.batch)
    order = range(SAMPLES)
    sums = new_sums(samples, order)

    def plain() -> None:
        for parameter in scored.values():
            parameter.requires_grad_(True)
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)
        model.requires_grad_(False)

    # Loads the libraries of matrix products.
    plain()
    wait()
    started = time.perf_counter()
    samples.accumulate(order, sums)
    wait()
    first = time.perf_counter() - started
    measured = {"fisher": lambda: samples.accumulate(order, sums), "plain": plain}
    seconds = side_by_side(synchronised(measured), REPEATS)
    what = f"Fisher pass of {SAMPLES} samples / forward + backward, batches of {samples.fitting}"
    yield (found := row("fisher", what, name, gpu_models.TOKENS, seconds, "fisher", "plain", limit=PASS_BAR))
    excess = max(0.0, first - found["seconds"]["fisher"])
    what = "first Fisher pass of a process beyond the second, s"
    yield figure("fisher", what, name, gpu_models.TOKENS, excess, limit=FIRST_BAR)
    yield from _loss_rows(name, model)


def _loss_rows(name: str, model: Any) -> Iterator[dict[str, Any]]:
    """The losses of a batch's tokens, and their gradients for the hidden states, by the frozen head."""
    size, head = SIZES[name], model.get_output_embeddings()
    shape = (size.batch, gpu_models.TOKENS, size.hidden)
    hidden_BTD = torch.randn(shape, device=gpu_models.DEVICE, dtype=torch.bfloat16)
    targets_BT = next_tokens(torch.randint(0, size.vocabulary, shape[:2], device=gpu_models.DEVICE))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda h: found_losses(head, h, targets_BT).sum(),
        "plain": lambda h: F.cross_entropy(head(h).float().flatten(0, 1), targets_BT.flatten(), reduction="sum"),
    }

    def run(loss: Callable[[Tensor], Tensor]) -> None:
        loss(hidden_BTD.detach().requires_grad_()).backward()

    seconds = side_by_side(synchronised({way: partial(run, loss) for way, loss in ways.items()}), REPEATS)
    ratio = row(
        "fisher", "losses of the head / of all logits at once", name, gpu_models.TOKENS, seconds, "ours", "plain"
    )
    spread = (1000 * min(seconds["ours"]), 1000 * max(seconds["ours"]))
    what = f"losses of the head and their gradients, a batch of {size.batch}, ms"
    milliseconds = 1000 * statistics.median(seconds["ours"])
    yield figure("fisher", what, name, gpu_models.TOKENS, milliseconds, spread, limit=LOSSES_BAR)
    yield ratio
