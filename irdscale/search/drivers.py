"""Which samples drive the winner's mask: each sample's share of the Fisher information inside the mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irdscale.config.loader import check_config
from irdscale.errors import InputError, RunError
from irdscale.fisher.accumulate import new_sums
from irdscale.fisher.passes import SampleGradients
from irdscale.fisher.pool import draw_samples, sample_gradients
from irdscale.fisher.scores import reads_samples, summed
from irdscale.masks.mask import Mask
from irdscale.runs.folder import refuse_other_input
from irdscale.tasks import load_task
from irdscale.training.head_warmup import model_to_score
from irdscale.utils.files import read_json, write_json


def masked_traces(
    samples: SampleGradients,
    order: Sequence[int],
    mask: Mask,
    *,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    progress: bool = False,
) -> Tensor:
    """Each ordered sample's sum of squared gradients over the mask's entries, float64 [len(order)].

    Takes one backward pass per sample, through the parameters with mask entries.

    Args:
        dtype, offload: dtype and place of the sums, as in `accumulate_fisher`.

    Raises:
        InputError: the mask has entries in a parameter that is not scored or has another shape (names it).
    """
    for name in mask.indices:
        found = samples.shapes.get(name)
        if found != mask.shapes[name]:
            raise InputError(f"{name}: found shape {found} in the model", f"{mask.shapes[name]}", key="mask")
    inside = replace(samples, scored={name: p for name, p in samples.scored.items() if name in mask.indices})
    sums = new_sums(inside, order, dtype=dtype, offload=offload)
    places = {name: mask.indices[name].long().to(total.device) for name, total in sums.tensors.items()}
    found_N = torch.zeros(len(order), dtype=torch.float64)

    def read(size: int) -> None:
        for name, total in sums.tensors.items():
            flat = total.view(-1)
            found_N[size - 1] += flat[places[name]].double().sum().cpu()
            # Entries outside the mask keep growing and are never read.
            flat[places[name]] = 0

    inside.accumulate(
        order,
        sums,
        boundaries=range(1, len(order) + 1),
        at_boundary=read,
        progress=progress,
        description="Samples of the mask",
    )
    return found_N


def write_drivers(output: Path, result: dict[str, Any], progress: bool = True) -> Path:
    """Write the share of each of the winner's samples to OUTPUT/fisher/drivers.json; returns its path.

    Loads the search's data and model into this process.

    Args:
        output: folder of a finished search.
        result: contents of its result.json.

    Raises:
        InputError: the mask's score reads no samples or takes no gradients, or the data or the model differ from the
            search's.
        RunError: the file cannot be written.
    """
    config = check_config(result["config"], str(output / "result.json"))
    if summed(config.fisher.score) is None:
        why = "takes no gradients" if reads_samples(config.fisher.score) else "reads no samples"
        fault = f"found {config.fisher.score}, a score that {why}"
        raise InputError(fault, "fisher, gradient, saliency, gem or gallop", key="fisher.score")
    # Partitioning changes no gradient, and there is one process.
    config = config.model_copy(update={"train": config.train.model_copy(update={"deepspeed": None})})
    traces = read_json(output / "fisher" / "traces.json", "list of traces")
    mask = Mask.load(output / result["best"]["mask"])
    task = load_task(config)
    refuse_other_input(config.model_copy(update={"output": str(output)}), task)
    pool = draw_samples(config, task, config.fisher.samples, "pool")
    if list(task.population.select(pool)["row"]) != traces["row"]:
        raise InputError("found other samples than the search", "the same", "task.dataset", where=config.task.dataset)
    kept = traces["order"][: result["best"]["samples"]]
    with model_to_score(config, task, progress) as (model, outside):
        found_N = masked_traces(
            sample_gradients(config, task, model, pool, outside),
            kept,
            mask,
            dtype=torch.float64 if config.fisher.dtype == "float64" else torch.float32,
            offload=config.fisher.offload,
            progress=progress,
        )
    total = float(found_N.sum())
    if total == 0:
        raise RunError(f"{output}: no sample has a gradient inside the winner's mask")
    file = output / "fisher" / "drivers.json"
    write_json(file, {"mask": mask.hash, "place": kept, "share": (found_N / total).tolist()})
    return file
