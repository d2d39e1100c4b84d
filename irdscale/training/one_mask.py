"""The verbs `fisher`, `train`, `evaluate` and `export`."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from irdscale.adapters import adapter_head, export_shira, push_adapter, save_adapter
from irdscale.config.schema import RunConfig, training_steps
from irdscale.distributed.ranks import (
    failing_together,
    rank_and_world,
    remove_folder,
    same_on_every_rank,
    write_json_once,
)
from irdscale.fisher.pool import saved_pass, traces_of
from irdscale.masks.mask import Mask
from irdscale.runs.folder import held, mask_part, training_part
from irdscale.sparse import merge, sparse_state, trained_on
from irdscale.tasks import load_task, tell_classes
from irdscale.tasks.outputs import Outputs
from irdscale.training.control import shown
from irdscale.training.evaluate import evaluate_model, evaluate_with_errors
from irdscale.training.loss_trend import rise_warning
from irdscale.training.mask_passes import MaskPass, kept_earlier, make_mask
from irdscale.training.metrics_file import NAME as METRICS
from irdscale.training.predict import predictions_of_test, write_predictions
from irdscale.training.recorder import Records
from irdscale.training.result import task_facts, versions
from irdscale.training.targets import HUB, check_export, check_target
from irdscale.training.trackers import require_trackers
from irdscale.training.trainable import adapted_model, sparse_model
from irdscale.training.trainer import adapter_config, adapter_dtype, fine_tune
from irdscale.utils.files import digest, read_json, write_folder, write_json
from irdscale.utils.progress import bar

if TYPE_CHECKING:
    from irdscale.tasks import Task

log = logging.getLogger(__name__)
# Rows of the training data that ranks compare.
COMPARED_ROWS = 16


def run_fisher(config: RunConfig, progress: bool = True, overwrite: bool = False) -> dict[str, Any]:
    """Write the FISH mask of `fisher.samples` random samples to OUTPUT/mask, and their Fisher traces beside it.

    Collective where torch.distributed is initialised: the ranks share the samples, and rank 0 writes. A repeated call
    returns the stored result.

    Args:
        overwrite: whether to delete the contents of OUTPUT first.

    Returns:
        {"mask", "hash", "params", "parameters", "scored", "samples", "sample_gradients", "seconds"}

    Raises:
        InputError: the configuration does not fit the data or the model, or OUTPUT holds other work (named).
        RunError: the output cannot be written.
    """
    with held(config, overwrite) as folder:
        output = folder.output
        with failing_together():
            task = load_task(config)
        folder.claim(task, {"mask": mask_part(config)})
        earlier = folder.result("mask", "mask/mask.json")
        if earlier is not None:
            return earlier | {"mask": str(output / "mask")}
        tell_classes(task, progress and rank_and_world()[0] == 0)
        mask, traces, drawn = _make_mask(config, task, progress)
        write_json_once(output / "traces.json", traces)
        sizes = {"params": mask.k, "samples": len(drawn.places)}
        result = {"mask": str(output / "mask"), "hash": mask.hash, **sizes, **drawn.facts()}
        folder.keep("mask", result)
        return result


def run_train(
    config: RunConfig, mask: str | None = None, progress: bool = True, overwrite: bool = False
) -> dict[str, Any]:
    """Train one mask, from a folder or computed like `run_fisher`'s, and write OUTPUT/adapter and OUTPUT/result.json.

    The training uses the first of `search.seeds`. Collective where torch.distributed is initialised: the ranks share
    each batch, by DDP or by `train.deepspeed`, and rank 0 writes. A killed training resumes from its last saved state,
    in OUTPUT/training; a signal (SIGINT, SIGTERM) saves one. OUTPUT/metrics.jsonl gets the metrics of every step. A
    repeated call returns the stored result.

    Args:
        mask: folder of the mask; None to compute it.
        overwrite: whether to delete the contents of OUTPUT first.

    Returns:
        The contents of OUTPUT/result.json: {"adapter", "mask", "params", "head", "steps", "kept_step", "seed",
        "selection", "test", "test_error", "loss", "warnings", "seconds"}: metrics by split, their standard errors on
        test, and the loss at the beginning and end; and as in a search's result {"best", "task", "config", "versions"}.

    Raises:
        InputError: the mask does not fit the model, the configuration does not fit the data, the model or the ranks, or
            OUTPUT holds other work (named).
        RunError: the loss is NaN or infinite, a rank died, or the output cannot be written.
    """
    with held(config, overwrite) as folder:
        output, seed = folder.output, config.search.seeds[0]
        with failing_together():
            require_trackers(config)
            task = load_task(config)
            chosen = Mask.load(mask) if mask is not None else None
        part = training_part(config, None if chosen is None else chosen.hash)
        folder.claim(task, {"training": part, **({} if chosen is not None else {"mask": mask_part(config)})}, mask)
        earlier = folder.result("training", "adapter/adapter.json")
        if earlier is not None:
            return earlier | {"adapter": str(output / "adapter")}
        tell_classes(task, progress and rank_and_world()[0] == 0)
        chosen = chosen if chosen is not None else _own_mask(config, task, progress)
        result = _trained(config, task, chosen, seed, progress)
        write_json_once(output / "result.json", result)
        folder.keep("training", result)
        remove_folder(output / "training")
        return result


def _trained(config: RunConfig, task: Task, mask: Mask, seed: int, progress: bool) -> dict[str, Any]:
    """Train a mask and write OUTPUT/adapter; returns `run_train`'s result."""
    started, output = time.perf_counter(), Path(config.output)
    with failing_together():
        model = sparse_model(config, task, mask, seed)
        work = {**trained_on(model), "training data": _some_rows(task)}
    same_on_every_rank(work)
    steps, kept = training_steps(config.train, len(task.trained)), list[int]()
    records = Records(output / METRICS, output.absolute().name, output / "tensorboard")
    with bar("Training", steps, enabled=progress and rank_and_world()[0] == 0) as advance:
        control = replace(shown(advance), kept=kept.append)
        trend = fine_tune(model, task, config, seed, control, output / "training", records)
    warnings = [rise_warning(trend)] if trend is not None and trend["rose"] else []
    for text in warnings if rank_and_world()[0] == 0 else ():
        log.warning(text)
    save_adapter(model, output / "adapter", adapter_config(config, task, seed), adapter_dtype(config))
    state_of, size = sparse_state(model), config.train.eval_batch_size
    selection = evaluate_model(model, task, task.selection, size)
    test, errors = evaluate_with_errors(model, task, task.test, size)
    return {
        "adapter": str(output / "adapter"),
        "mask": mask.hash,
        "params": state_of.k,
        "head": state_of.dense_parameters,
        "steps": steps,
        "kept_step": kept[0] if kept else steps,
        "seed": seed,
        "selection": selection,
        "test": test,
        "test_error": errors,
        "loss": trend,
        "warnings": warnings,
        "seconds": round(time.perf_counter() - started, 2),
        "best": {
            "params": state_of.k,
            "metric": selection[task.metric],
            "test_metric": test[task.metric],
            "test_error": errors[task.metric],
            "mask": mask.hash,
            "adapter": "adapter",
        },
        "task": task_facts(task),
        "config": config.model_dump(mode="json"),
        "versions": versions(),
    }


def _some_rows(task: Task) -> str:
    """Hash of the train split's length and of some of its rows, evenly spaced."""
    count = len(task.train)
    return digest([count, *(str(task.train[count * i // COMPARED_ROWS]) for i in range(COMPARED_ROWS))])


def _own_mask(config: RunConfig, task: Task, progress: bool) -> Mask:
    """The mask that `search.ratio` asks for, made here or by an earlier run of this training."""
    folder, note = Path(config.output) / "mask", _note(config)

    def find() -> Mask | None:
        stored = read_json(note, "origin of a mask") if folder.exists() else {}
        mask = Mask.load(folder) if isinstance(stored, dict) and stored.get("made_by") == _made_by(config) else None
        return mask if mask is not None and mask.hash == stored["hash"] else None

    earlier = kept_earlier(note, find)
    return earlier if earlier is not None else _make_mask(config, task, progress)[0]


def _make_mask(config: RunConfig, task: Task, progress: bool) -> tuple[Mask, dict[str, Any], MaskPass]:
    """Make the FISH mask of `fisher.samples` samples and write OUTPUT/mask; returns the samples' traces too."""
    count = config.fisher.samples
    traces = torch.zeros(count, dtype=torch.float64)
    mask, drawn = make_mask(config, task, count, "pool", "mask", progress, traces=traces)
    with failing_together():
        if rank_and_world()[0] == 0:
            mask.save(Path(config.output) / "mask")
            write_json(_note(config), {"made_by": _made_by(config), "hash": mask.hash})
            saved_pass(config, "mask").remove()
    return mask, traces_of(task, drawn.places, traces), drawn


def _note(config: RunConfig) -> Path:
    """File with the origin of the folder's mask."""
    return Path(config.output) / "fisher" / "mask.json"


def _made_by(config: RunConfig) -> str:
    return digest(mask_part(config))


def run_evaluate(config: RunConfig, adapter: str, progress: bool = True, to: str | None = None) -> dict[str, Any]:
    """Metrics of an adapter on the selection and the test split. Collective where torch.distributed is initialised.

    Args:
        to: a JSONL file to write the predictions for the test split to, as `irdscale.training.predict.run_predict`.

    Returns:
        {"adapter", "params", "head", "selection", "test", "test_error"}: metrics by split, and their standard errors
        on test; with `to`, "predictions", the file.

    Raises:
        InputError: the adapter is missing or damaged, or belongs to another base, other classes or another kind of
            task; or `to` holds something else.
        RunError: `to` cannot be written.
    """
    with failing_together():
        check_target(to)
        task = load_task(config, adapter_head(adapter))
        model, _ = adapted_model(config, task, adapter)
    state = sparse_state(model)
    result: dict[str, Any] = {"adapter": adapter, "params": state.k, "head": state.dense_parameters}
    outputs = None if to is None else Outputs()
    with bar("Evaluating", 2, enabled=progress and rank_and_world()[0] == 0) as advance:
        result["selection"] = evaluate_model(model, task, task.selection, config.train.eval_batch_size)
        advance()
        found = evaluate_with_errors(model, task, task.test, config.train.eval_batch_size, outputs)
        result["test"], result["test_error"] = found
        advance()
    if to is not None and outputs is not None:
        write_predictions(to, predictions_of_test(config, model, task, outputs))
        result["predictions"] = to
    return result


def run_export(config: RunConfig, adapter: str, to: str, format: str | None = None) -> dict[str, Any]:
    """Export an adapter as a merged checkpoint or a PEFT adapter, or upload it to the Hugging Face hub.

    Args:
        adapter: adapter folder, or OWNER/NAME on the hub.
        to: new folder; or `hub:OWNER/NAME`, to upload the adapter unchanged (a new repository is private).
        format: format of a folder: `merged` (the default), a plain Hugging Face checkpoint with its tokenizer; or
            `shira`, an adapter that PEFT loads (see `irdscale.export_shira`).

    Returns:
        {"checkpoint", "adapter", "params"}; with shira {"peft", "adapter", "params", "r", "layers", "stored", "whole"};
        with the hub {"hub", "adapter"}.

    Raises:
        InputError: `to` is not empty, the adapter is missing, damaged or of another base, or SHiRA cannot represent it.
        RunError: `to` cannot be written, or the hub refuses the upload.
    """
    check_export(to, format)
    if to.startswith(HUB):
        return {"hub": push_adapter(adapter, to.removeprefix(HUB)), "adapter": adapter}
    target = Path(to)
    # One process merges the full model.
    config = config.model_copy(update={"train": config.train.model_copy(update={"deepspeed": None})})
    task = load_task(config, adapter_head(adapter))
    model, new = adapted_model(config, task, adapter)
    params = sparse_state(model).k
    if format == "shira":
        return {"peft": to, "adapter": adapter, "params": params, **export_shira(model, target, also=new)}
    merge(model)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)

    write_folder(target, fill)
    return {"checkpoint": to, "adapter": adapter, "params": params}
