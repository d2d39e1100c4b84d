"""The diagonal Fisher information of a model over a data set, and each sample's trace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from irdscale.distributed.ranks import rank_and_world, same_on_every_rank
from irdscale.distributed.zero3 import unwrapped
from irdscale.errors import InputError
from irdscale.fisher.checkpoint import SavedPass
from irdscale.fisher.diagonal import Fisher, Layout
from irdscale.fisher.losses import Objective, TokenReduction
from irdscale.fisher.memory_check import check_memory
from irdscale.fisher.passes import SampleGradients
from irdscale.fisher.squares import add_squares
from irdscale.fisher.sums import Add, ReplicatedSums, ShardedSums, Sums
from irdscale.models.batches import Collate, SizedDataset
from irdscale.models.quantized import adopt
from irdscale.utils.quantized import is_quantized


def scored_parameters(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """The floating-point and quantised parameters that match `include` and not `exclude`, tied ones once.

    Raises:
        InputError: an expression is malformed, or no parameter matches.
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
        key = f"fisher.include={include} and fisher.exclude={exclude}"
        raise InputError("found no parameter", f"names such as {names}", key)
    return kept


def _expressions(key: str, patterns: str | Sequence[str] | None) -> list[re.Pattern[str]] | None:
    if patterns is None:
        return None
    try:
        return [re.compile(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    except re.error as error:
        raise InputError(f"found {patterns!r}", f"regular expressions ({error})", f"fisher.{key}") from None


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

    Each sample's own gradient is squared, then summed (Sung, Nair, Raffel 2021, arXiv 2111.09839, equation 3). The
    result does not depend on batch size, layout or world size beyond rounding. The model runs in evaluation mode and is
    restored. With torch.distributed initialised the call is collective: every rank passes the same model and full data
    set, takes its shard of the samples, and gets the full result or its slice. A ZeRO-3 model stays partitioned.
    A model quantised by bitsandbytes computes with its dequantised weights from then on, and the diagonal is theirs.

    Args:
        model: returns logits [B, C] (classification, regression) or [B, T, V] (causal language model)
        dataset: N rows for `collate_fn`
        collate_fn: maps rows to a dictionary of tensors whose first dimension is the batch, with `labels`
        objective: `label` (labels of the data), `sampled` (labels drawn from the model, by `seed` and the sample's
            index) or `expected` (all classes, one backward pass each)
        include, exclude: regular expressions, searched in parameter names
        layout: `replicated` (every rank holds the full diagonal) or `sharded` (a rank holds 1 / world size of it)
        dtype: data type of the sums; squares are formed in float32 at least
        token_reduction: reduction of a text's loss over its target tokens
        offload: keep the sums in main memory while the model is on a GPU
        save_to: folder for the state of the pass, shared by all ranks and removed at the end; a killed pass continues
            from there on any number of ranks
        save_minutes: minutes between two saves

    Raises:
        InputError: an option is unknown, no parameter or sample is left, a loss is not finite or not supported, ranks
            have different inputs, or the sums or a batch do not fit in memory.
        RunError: a rank died (named).
    """
    _check_options(len(dataset), batch_size, objective=objective, layout=layout, token_reduction=token_reduction)
    model = adopt(unwrapped(model))
    scored = scored_parameters(model, include, exclude)
    samples = SampleGradients(model, dataset, collate_fn, scored, batch_size, objective, token_reduction, seed)
    order = range(len(dataset))
    sums = new_sums(samples, order, layout=layout, dtype=dtype, offload=offload)
    traces = torch.zeros(len(dataset), dtype=torch.float64)
    saved = None if save_to is None else SavedPass(Path(save_to), save_minutes)
    samples.accumulate(order, sums, traces, progress=progress, saved=saved)
    for total in sums.tensors.values():
        total /= len(dataset)
    if saved is not None:
        saved.remove()
    return Fisher(sums.tensors, traces, samples.taken, sums.layout, samples.shapes)


def new_sums(
    samples: SampleGradients,
    order: Sequence[int],
    *,
    layout: Layout = "replicated",
    dtype: torch.dtype = torch.float32,
    add: Add = add_squares,
    offload: bool = False,
) -> Sums:
    """Zero sums for a pass over the ordered samples; collective.

    Raises:
        InputError: they do not fit in memory, ranks have different options, or `SampleGradients.prepare` raises it.
    """
    same_on_every_rank({"layout": layout, "data type of the sums": dtype, "offload": offload})
    check_memory(samples.shapes, dtype, layout, samples.device, offload)
    if layout == "replicated" or rank_and_world()[1] == 1:
        return ReplicatedSums(samples.shapes, dtype, samples.device, add, offload)
    samples.prepare(order)
    arrival = samples.arrival_order(order[0])
    return ShardedSums(samples.shapes, dtype, samples.device, add, arrival, offload)


def _check_options(count: int, batch_size: int, **options: str) -> None:
    known = {"objective": get_args(Objective), "layout": get_args(Layout), "token_reduction": get_args(TokenReduction)}
    for key, value in options.items():
        if value not in known[key]:
            raise InputError(f"found {value!r}", f"one of {', '.join(known[key])}", key)
    if count == 0:
        raise InputError("the data set is empty", "at least one sample")
    if batch_size < 1:
        raise InputError(f"found {batch_size}", "at least 1", "fisher.batch_size")
