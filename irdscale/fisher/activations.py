"""Sizes of the inputs of linear layers over the tokens of samples, by forward passes alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.config.schema import Score
from irdscale.distributed.ranks import all_reduce_sum, rank_and_world, same_on_every_rank
from irdscale.errors import InputError
from irdscale.fisher.capture import holders
from irdscale.fisher.diagonal import Layout
from irdscale.fisher.memory_check import check_memory
from irdscale.fisher.passes import SampleGradients
from irdscale.fisher.rules import input_dimension
from irdscale.models.batches import LateRows, shared_batches
from irdscale.utils.files import digest
from irdscale.utils.progress import Advance, bar


def of_linear_layers(model: nn.Module, scored: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The weights of linear layers among the scored parameters: those whose entries multiply an input."""
    kept = {name for module, own in holders(model, scored).items() for name in _weight_of(module, own)}
    return {name: parameter for name, parameter in scored.items() if name in kept}


def _weight_of(module: nn.Module, own: dict[str, str]) -> list[str]:
    """The scored name of a linear layer's weight, if it is scored; none for other modules."""
    return [name for local, name in own.items() if local == "weight" and input_dimension(module) is not None]


def input_sizes(
    samples: SampleGradients,
    order: Sequence[int],
    sizes: Sequence[int],
    score: Score,
    *,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "replicated",
    offload: bool = False,
    progress: bool = False,
) -> dict[int, dict[str, Tensor]]:
    """For each s in `sizes`, the size of each input of the scored weights over the first s ordered samples.

    The inputs are those of all tokens but padding, over all uses of a weight. A layer that sees one vector for each
    sample, such as a pooler, counts that one. It takes one forward pass over the first max(sizes) samples and no
    backward pass. Collective: each rank takes its shard of the samples, and all ranks get the same sizes.

    Args:
        score: `activation` for the norm of each input, `mean_activation` for the mean of its absolute value
        dtype: data type of the sums
        layout, offload: those of the scores, which are checked to fit in memory; with `offload` the sizes are in main
            memory

    Returns:
        s -> name -> tensor of shape [1, I], or [I, 1] for a weight [I, O], for which entry_scores multiplies |W|.

    Raises:
        InputError: a scored parameter is no linear layer's weight, a layer's inputs are not the tokens of the batch, a
            loss is not finite, or `SampleGradients.prepare` raises it.
    """
    samples.prepare(order)
    same_on_every_rank({"order of samples": digest(list(order)), "sizes of sample sets": sorted(sizes), "score": score})
    check_memory(samples.shapes, dtype, layout, samples.device, offload)
    inputs = _Inputs(samples, score, dtype)
    losses_N = torch.zeros(len(samples.dataset), dtype=torch.float64)
    shown = bar("Activations", max(sizes), enabled=progress and rank_and_world()[0] == 0)
    with shown as advance, samples.forward_only(samples.loss) as together, inputs:
        inputs.try_two(samples, order)
        found = _totals(samples, order, sizes, inputs, losses_N, together, advance)
    all_reduce_sum([losses_N, *(total_C for totals in found.values() for total_C in totals.values())])
    samples.loss.check_finite(range(len(losses_N)), losses_N)
    return {stop: inputs.sizes(totals, offload) for stop, totals in found.items()}


def _totals(
    samples: SampleGradients,
    order: Sequence[int],
    sizes: Sequence[int],
    inputs: _Inputs,
    losses_N: Tensor,
    together: int,
    advance: Advance,
) -> dict[int, dict[str, Tensor]]:
    """This rank's sums over the first s ordered samples, for each s in `sizes`.

    Args:
        losses_N: receives the loss of each visited sample
        together: samples in a forward pass
    """
    losses, found, begin = LateRows(losses_N), {}, 0
    world = rank_and_world()[1]
    for stop in sorted(set(sizes)):
        part = order[begin:stop]

        def measure(places: list[int], part: Sequence[int] = part) -> None:
            indices = [part[place] for place in places]
            inputs.counting = bool(indices)
            loss_B = samples.loss.of(indices or [order[0]], inputs.forward)[0]
            if indices:
                losses.add(indices, loss_B)
                advance(world * len(indices))

        shared_batches(samples.model, [1] * len(part), together, measure)
        found[stop] = {name: total_C.clone() for name, total_C in inputs.totals.items()}
        begin = stop
    losses.read()
    return found


class _Inputs:
    """Hooks on the linear layers of scored weights, which add up what the layers see.

    Attributes:
        counting: whether the next forward pass counts; one that does not tries the model, or keeps ranks in step
        totals: name -> the sums over tokens for each input, and the number of tokens, in one tensor [I + 1]
    """

    def __init__(self, samples: SampleGradients, score: Score, dtype: torch.dtype) -> None:
        self._model, self._squared = samples.model, score == "activation"
        held = holders(samples.model, samples.scored)
        self._names = {module: name for module, own in held.items() for name in _weight_of(module, own)}
        lacking = [name for name in samples.scored if name not in self._names.values()]
        if lacking:
            expected = f"the weight of a linear layer, for fisher.score {score}"
            raise InputError("found no inputs that it multiplies", expected, key=lacking[0])
        dimensions = {name: input_dimension(module) for module, name in self._names.items()}
        self._shapes = {name: (1, -1) if dimension else (-1, 1) for name, dimension in dimensions.items()}
        self.totals = {
            name: torch.zeros(samples.shapes[name][dimension or 0] + 1, dtype=dtype, device=samples.device)
            for name, dimension in dimensions.items()
        }
        self.counting = True
        self._valid_BT = torch.ones(0, 0, dtype=torch.bool)
        self._cleaning = ExitStack()

    def __enter__(self) -> _Inputs:
        for module in self._names:
            self._cleaning.callback(module.register_forward_pre_hook(self._on_forward, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._cleaning.close()

    def forward(self, inputs: dict[str, Any]) -> Any:
        """Run the model on a batch."""
        mask_BT = inputs.get("attention_mask")
        self._valid_BT = torch.ones_like(inputs["input_ids"]).bool() if mask_BT is None else mask_BT.bool()
        return self._model(**inputs)

    def try_two(self, samples: SampleGradients, order: Sequence[int]) -> None:
        """Refuse a model whose layers see other things than tokens, which a batch of one sample may not show."""
        self.counting = False
        batch = samples.loss.small_batch([order[0], order[-1]])
        self.forward({key: value for key, value in batch.items() if key != "labels"})

    def sizes(self, totals: dict[str, Tensor], offload: bool) -> dict[str, Tensor]:
        """The norm or the mean of each input, in a shape that broadcasts to that of the weight."""
        found = {}
        for name, total_C in totals.items():
            size_I = total_C[:-1].sqrt() if self._squared else total_C[:-1] / total_C[-1].clamp(min=1)
            found[name] = (size_I.cpu() if offload else size_I).view(self._shapes[name])
        return found

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._names[module]
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        x_BPI, valid_BP = self._by_sample(name, x.detach())
        if not self.counting:
            return
        total_C = self.totals[name]
        x_NI = x_BPI.masked_fill(~valid_BP.unsqueeze(2), 0).flatten(0, 1).to(total_C.dtype)
        total_C[:-1] += torch.linalg.vecdot(x_NI, x_NI, dim=0) if self._squared else x_NI.abs().sum(0)
        total_C[-1] += valid_BP.sum()

    def _by_sample(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's input as vectors of samples [B, P, I], and which of them count [B, P]; P is 1 or the tokens T."""
        size, length = self._valid_BT.shape
        if x.shape[0] in (size, size * length):
            x_BPI = x.reshape(size, -1, x.shape[-1])
            if x_BPI.shape[1] == length:
                return x_BPI, self._valid_BT
            if x_BPI.shape[1] == 1:
                return x_BPI, torch.ones_like(self._valid_BT[:, :1])
        found = f"found an input of shape {list(x.shape)} for {size} samples of {length} tokens"
        raise InputError(found, "one vector for each token, or for each sample", key=name)
