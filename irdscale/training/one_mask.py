"""The verbs around the search: score, train one mask, evaluate and export an adapter."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from irdscale.adapters import adapter_head, export_shira, push_adapter, save_adapter
from irdscale.config.schema import RunConfig, training_steps
from irdscale.distributed.ranks import broadcast_flag, failing_together, rank_and_world, same_on_every_rank
from irdscale.distributed.zero3 import numel_of
from irdscale.errors import InputError
from irdscale.fisher.pool import draw_samples, mask_size, ranked_entries, sample_gradients, saved_pass, traces_of
from irdscale.masks.mask import Mask
from irdscale.runs.folder import held, mask_part, training_part
from irdscale.sparse import merge, sparse_state, trained_on
from irdscale.tasks import load_task, tell_classes
from irdscale.tasks.outputs import Outputs
from irdscale.training.adapted import adapted_model
from irdscale.training.checkpoint import remove_training
from irdscale.training.evaluate import evaluate_model, evaluate_with_errors
from irdscale.training.head_warmup import model_to_score
from irdscale.training.loss_trend import said_of_rise
from irdscale.training.predict import check_target, predictions_of_test, write_predictions
from irdscale.training.trainer import Control, adapter_config, adapter_dtype, fine_tune, sparse_model
from irdscale.utils.files import digest, read_json, write_folder, write_json
from irdscale.utils.progress import bar
from irdscale.utils.suggestions import nearest

if TYPE_CHECKING:
    from irdscale.tasks import Task

log = logging.getLogger(__name__)
EXPORT_FORMATS = ("merged", "shira")
HUB = "hub:"
# Of the training data, to notice a rank that has others.
COMPARED_ROWS = 16


def _fisher_mask(config: RunConfig, task: Task, progress: bool) -> tuple[Mask, dict[str, Any], dict[str, Any]]:
    """The FISH mask of `fisher.samples` samples, the samples' traces, and what it took."""
    started = time.perf_counter()
    with model_to_score(config, task, progress) as (model, dense):
        with failing_together():
            pool = draw_samples(config, task, config.fisher.samples, "pool")
            samples = sample_gradients(config, task, model, pool, dense)
            scored = sum(map(numel_of, samples.scored.values()))
            k = mask_size(config, model, scored)
        traces = torch.zeros(len(pool), dtype=torch.float64)
        size = len(pool)
        rankings = ranked_entries(config, samples, range(size), [size], k, "mask", traces=traces, progress=progress)
        mask = rankings[size].prefix(k)
        facts = {
            "params": k,
            "parameters": sum(map(numel_of, model.parameters())),
            "scored": scored,
            "samples": len(pool),
            "sample_gradients": samples.taken,
            "seconds": round(time.perf_counter() - started, 2),
        }
    return mask, traces_of(task, pool, traces), facts


def run_fisher(config: RunConfig, progress: bool = True, overwrite: bool = False) -> dict[str, Any]:
    """Write the FISH mask of `fisher.samples` random samples to OUTPUT/mask, and their traces beside it.

    Collective where torch.distributed is initialised: the ranks share the samples, and rank 0 writes. The same call
    again returns the result that is there.

    Args:
        overwrite: remove what an earlier run, or other work, has written to OUTPUT.

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
        mask, traces, facts = _fisher_mask(config, task, progress)
        with failing_together():
            if rank_and_world()[0] == 0:
                mask.save(output / "mask")
                write_json(output / "traces.json", traces)
                write_json(_note(output), {"made_by": _made_by(config), "hash": mask.hash})
                saved_pass(config, "mask").remove()
        result = {"mask": str(output / "mask"), "hash": mask.hash, **facts}
        folder.keep("mask", result)
        return result


def run_train(
    config: RunConfig, mask: str | None = None, progress: bool = True, overwrite: bool = False
) -> dict[str, Any]:
    """Train one mask, from a folder or made by `run_fisher`'s way, and write OUTPUT/adapter.

    Trains with the first of `search.seeds`. Collective where torch.distributed is initialised: the ranks share each
    batch, by DDP or as `train.deepspeed` says, and rank 0 writes. One that was killed goes on from the state that it
    saved last, in OUTPUT/training; a signal (SIGINT, SIGTERM) saves one. The same call again returns the result.

    Args:
        overwrite: remove what an earlier run, or other work, has written to OUTPUT.

    Returns:
        {"adapter", "mask", "params", "head", "steps", "seed", "selection", "test", "test_error", "loss", "warnings",
        "seconds"}: metrics by split, the standard error of each on test, and where the loss began and ended.

    Raises:
        InputError: the mask does not fit the model, the configuration does not fit the data, the model or the ranks, or
            OUTPUT holds other work (named).
        RunError: the loss is no number, a rank died, or the output cannot be written.
    """
    with held(config, overwrite) as folder:
        output, seed = folder.output, config.search.seeds[0]
        with failing_together():
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
        folder.keep("training", result)
        remove_training(output / "training")
        return result


def _trained(config: RunConfig, task: Task, mask: Mask, seed: int, progress: bool) -> dict[str, Any]:
    """Train a mask and write OUTPUT/adapter; what `run_train` returns."""
    started, output = time.perf_counter(), Path(config.output)
    with failing_together():
        model = sparse_model(config, task, mask, seed)
        work = {**trained_on(model), "training data": _some_rows(task)}
    same_on_every_rank(work)
    steps = training_steps(config.train, len(task.trained))
    with bar("Training", steps, enabled=progress and rank_and_world()[0] == 0) as advance:
        control = Control(advance, resumed=partial(advance, earlier=True))
        trend = fine_tune(model, task, config, seed, control, output / "training")
    warnings = [said_of_rise(trend)] if trend is not None and trend["rose"] else []
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
        "seed": seed,
        "selection": selection,
        "test": test,
        "test_error": errors,
        "loss": trend,
        "warnings": warnings,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _some_rows(task: Task) -> str:
    """A hash of some rows of the train split, spread over it, and of their number."""
    count = len(task.train)
    return digest([count, *(str(task.train[count * i // COMPARED_ROWS]) for i in range(COMPARED_ROWS))])


def _note(output: Path) -> Path:
    """Where it stands what the folder's mask was made by."""
    return output / "fisher" / "mask.json"


def _made_by(config: RunConfig) -> str:
    return digest(mask_part(config))


def _own_mask(config: RunConfig, task: Task, progress: bool) -> Mask:
    """The mask that `search.ratio` asks for; a training that was killed finds the one that was made for it."""
    output = Path(config.output)
    folder, note, made_by = output / "mask", _note(output), _made_by(config)
    with failing_together():
        stored = read_json(note, "origin of a mask") if note.exists() and folder.exists() else {}
        mask = Mask.load(folder) if isinstance(stored, dict) and stored.get("made_by") == made_by else None
        mask = mask if mask is not None and mask.hash == stored["hash"] else None
    if broadcast_flag(mask is not None):
        if mask is None:
            raise InputError(f"{note}: not found on this rank; expected an output folder that all ranks share")
        return mask
    mask = _fisher_mask(config, task, progress)[0]
    with failing_together():
        if rank_and_world()[0] == 0:
            mask.save(folder)
            write_json(note, {"made_by": made_by, "hash": mask.hash})
            saved_pass(config, "mask").remove()
    return mask


def run_evaluate(config: RunConfig, adapter: str, progress: bool = True, to: str | None = None) -> dict[str, Any]:
    """Metrics of an adapter on the selection and the test split. Collective where torch.distributed is initialised.

    Args:
        to: a JSONL file to write the predictions for the test split to, as `irdscale.training.predict.run_predict`.

    Returns:
        {"adapter", "params", "head", "selection", "test", "test_error"}: metrics by split, and the standard error of
        each on test; with `to`, "predictions", the file.

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
    """Write an adapter, with the base model, for others to load.

    Args:
        adapter: a folder, or OWNER/NAME on the Hugging Face hub.
        to: a new folder; or `hub:OWNER/NAME`, to upload the adapter as it is; a new repository there is private.
        format: for a folder: `merged` (the default), a plain Hugging Face checkpoint with its tokenizer in which the
            adapter is merged; or `shira`, an adapter that PEFT loads (see `irdscale.export_shira`).

    Returns:
        {"checkpoint", "adapter", "params"}; of shira {"peft", "adapter", "params", "r", "layers", "stored", "whole"};
        of the hub {"hub", "adapter"}.

    Raises:
        InputError: `to` holds something, the adapter is missing, damaged or of another base, or SHiRA cannot say it.
        RunError: `to` cannot be written, or the hub does not take it.
    """
    if format is not None and format not in EXPORT_FORMATS:
        raise InputError(
            f"format: found {format!r}{nearest(format, EXPORT_FORMATS)}; expected {' or '.join(EXPORT_FORMATS)}"
        )
    if to.startswith(HUB):
        if format is not None:
            raise InputError(f"format: found {format!r} with to={to}; expected none: the adapter is uploaded as it is")
        return {"hub": push_adapter(adapter, to.removeprefix(HUB)), "adapter": adapter}
    target = Path(to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"to: {to} exists; expected a new or empty folder")
    # One process merges, which holds the whole model.
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
