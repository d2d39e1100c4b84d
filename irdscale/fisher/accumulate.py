"""The diagonal Fisher information of a model over a data set, and each sample's trace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from irdscale.distributed.ranks import rank_and_world, same_on_every_rank
from irdscale.distributed.zero3 import unwrapped
from irdscale.errors import InputError
from irdscale.fisher.checkpoint import SavedPass
from irdscale.fisher.diagonal import Fisher, Layout
from irdscale.fisher.losses import Objective, TokenReduction
from irdscale.fisher.memory_check import check_room
from irdscale.fisher.passes import Collate, SampleGradients, SizedDataset
from irdscale.fisher.rules import add_squares
from irdscale.fisher.sums import Add, ShardedSums, Sums, WholeSums
from irdscale.models.quantized import adopt
from irdscale.utils.quantized import is_quantized


def scored_parameters(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """The float and quantised parameters that match an `include` and no `exclude` expression, tied ones once.

    Raises:
        InputError: an expression is malformed, or no parameter is left.
    """
    wanted, unwanted = _expressions("include", include), _expressions("exclude", exclude)
    kept = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (parameter.is_floating_point() or is_quantized(parameter))
        and (wanted is None or any(e.search(name) for e in wanted))
        and not any(e.search(name) for e in unwanted or ())
    }
    if not kept:
        names = ", ".join(list(dict(model.named_parameters()))[:3])
        raise InputError(
            f"fisher.include={include} and fisher.exclude={exclude}: found no parameter; expected names such as {names}"
        )
    return kept


def _expressions(key: str, patterns: str | Sequence[str] | None) -> list[re.Pattern[str]] | None:
    if patterns is None:
        return None
    try:
        return [re.compile(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    except re.error as error:
        raise InputError(f"fisher.{key}: found {patterns!r}; expected regular expressions ({error})") from None


def accumulate_fisher(
    model: nn.Module,
    dataset: SizedDataset,
    *,
    collate_fn: Collate,
    batch_size: int = 8,
    objective: Objective = "label",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    layout: Layout = "replicated",
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    token_reduction: TokenReduction = "mean",
    seed: int = 0,
    offload: bool = False,
    save_to: Path | str | None = None,
    save_minutes: float = 10.0,
) -> Fisher:
    """The diagonal Fisher information of `model` over `dataset`: the mean of squared per-sample gradients.

    Each sample's own gradient is squared, then summed (Sung, Nair, Raffel 2021, arXiv 2111.09839, equation 3); the
    answer does not depend on the batch size or the number of ranks beyond float rounding. The model is put in
    evaluation mode for the passes and left as it was found. With torch.distributed initialised this is collective:
    every rank passes the same model and full data set, takes its share of the samples, and gets the whole result, or
    its slice of it. A model that DeepSpeed ZeRO-3 keeps in partitions stays so. Of a weight that bitsandbytes has
    quantised, it is the Fisher information of the dequantised matrix; the model then multiplies by that.

    Args:
        model: returns logits [B, C] (classification, regression) or [B, T, V] (causal language model).
        dataset: rows for `collate_fn`; N of them.
        collate_fn: a list of rows -> a dictionary of tensors whose first dimension is the batch, with `labels`.
        objective: `label` (the data's labels), `sampled` (drawn from the model, by `seed` and the sample's index) or
            `expected` (over all classes, one backward pass each).
        include, exclude: regular expressions, searched in parameter names.
        layout: `replicated`: every rank holds the whole diagonal, and one all-reduce adds the ranks' sums up.
            `sharded`: a rank holds 1 / world size of every parameter's entries; each layer's sum is reduce-scattered as
            its backward ends. One process holds the whole diagonal in either layout.
        dtype: of the sums; squares are formed in float32 at least.
        token_reduction: for language models, a sample's loss is the mean or the sum over its target tokens.
        offload: keep the sums in main memory where the model is on a GPU.
        save_to: a folder that all ranks share, for the state of the pass; a pass that was killed goes on from there,
            on any number of ranks. It is removed at the end.
        save_minutes: how often the state is saved.

    Raises:
        InputError: an unknown option, no parameter or sample is left, a sample's loss is not finite (named), or the
            model's loss is of a kind that is not covered, or the ranks differ in what they were given (named), or the
            sums or a batch do not fit in memory.
        RunError: a rank died (named).
    """
    _one_of("objective", objective, ("label", "sampled", "expected"))
    _one_of("layout", layout, ("replicated", "sharded"))
    _one_of("token_reduction", token_reduction, ("mean", "sum"))
    if len(dataset) == 0:
        raise InputError("the data set is empty; expected at least one sample")
    if batch_size < 1:
        raise InputError(f"fisher.batch_size: found {batch_size}; expected at least 1")
    model = unwrapped(model)
    adopt(model)
    samples = SampleGradients(
        model,
        dataset,
        collate_fn,
        scored_parameters(model, include, exclude),
        batch_size=batch_size,
        objective=objective,
        token_reduction=token_reduction,
        seed=seed,
    )
    order = range(len(dataset))
    sums = new_sums(samples, order, layout=layout, dtype=dtype, offload=offload)
    traces = torch.zeros(len(dataset), dtype=torch.float64)
    saved = None if save_to is None else SavedPass(Path(save_to), save_minutes)
    samples.accumulate(order, sums, traces, progress=progress, saved=saved)
    for total in sums.tensors.values():
        total /= len(dataset)
    if saved is not None:
        saved.remove()
    return sums.fisher(traces, samples.taken)


def new_sums(
    samples: SampleGradients,
    order: Sequence[int],
    *,
    layout: Layout = "replicated",
    dtype: torch.dtype = torch.float32,
    add: Add = add_squares,
    offload: bool = False,
) -> Sums:
    """Sums of zero for a pass over the ordered samples; collective.

    Raises:
        InputError: they do not fit in memory, ranks ask for different ones, or what `SampleGradients.prepare` refuses.
    """
    same_on_every_rank({"layout": layout, "data type of the sums": dtype, "offload": offload})
    check_room(samples.shapes, dtype, layout, samples.device, offload)
    if layout == "replicated" or rank_and_world()[1] == 1:
        return WholeSums(samples.shapes, dtype, samples.device, add, offload)
    samples.prepare(order)
    arrival = samples.arrival_order(order[0])
    return ShardedSums(samples.shapes, dtype, samples.device, add, arrival, offload)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name}: found {value!r}; expected one of {', '.join(known)}")
