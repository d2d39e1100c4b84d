"""Predictions of a model: classes, numbers, choices and completions, one JSON line per sample."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from irdscale.adapters import adapter_head
from irdscale.config.schema import RunConfig
from irdscale.distributed.ranks import failing_together, rank_and_world
from irdscale.distributed.watchdog import watched
from irdscale.distributed.zero3 import to_gpu
from irdscale.errors import InputError, TrainingError
from irdscale.models.build import build_model
from irdscale.tasks import load_task
from irdscale.tasks.answers import AnswerEnds, end_tokens
from irdscale.tasks.inputs import file_samples, prompts_of, text_samples
from irdscale.tasks.outputs import Outputs
from irdscale.training.evaluate import sample_logits
from irdscale.training.evaluate_language import choice_scores, generate_greedily, measure_choices
from irdscale.training.targets import check_predict
from irdscale.training.trainable import adapted_model
from irdscale.utils.files import write_atomic
from irdscale.utils.progress import bar

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from irdscale.tasks import Task

log = logging.getLogger(__name__)

Prediction = dict[str, Any]


def run_predict(
    config: RunConfig,
    adapter: str | None = None,
    input: str | None = None,
    to: str | None = None,
    text: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Predict by an adapter, or by the base model, for a file, one text, or the task's test split.

    Collective if torch.distributed is initialised: the ranks share the samples, and rank 0 writes.

    Args:
        adapter: folder, or OWNER/NAME on the Hugging Face hub; None for the base model.
        input: file with the columns of the task; labels and answers may be missing.
        to: JSONL file to write; an existing file is replaced only if it holds predictions.
        text: the only text to predict.

    Returns:
        {"adapter", "kind", "samples", "to"}, or without `to` {"adapter", "kind", "samples", "predictions"}; see
        `predictions`.

    Raises:
        InputError: `input` or `text` does not fit the task; `to` holds no predictions; there is no adapter and the
            model's head is new; or as `run_evaluate`.
        RunError: `to` cannot be written.
    """
    with failing_together():
        check_predict(input, text, to)
        task = load_task(config, None if adapter is None else adapter_head(adapter))
        samples = _chosen_samples(config, task, input, text)
        model = _chosen_model(config, task, adapter)
    rank = rank_and_world()[0]
    with bar("Predicting", len(samples), enabled=progress and rank == 0) as advance:
        found = predictions(config, model, task, samples, advance=advance)
    known = input is None and text is None
    rows = list(_with_expected(task, samples, found)) if known else found
    result: dict[str, Any] = {"adapter": adapter, "kind": task.kind, "samples": len(rows)}
    if to is None:
        return {**result, "predictions": rows}
    write_predictions(to, rows)
    return {**result, "to": to}


def write_predictions(to: str, rows: list[Prediction]) -> None:
    """Write predictions as JSON lines, atomically, on rank 0.

    Raises:
        RunError: the file cannot be written.
    """
    with failing_together():
        if rank_and_world()[0] == 0:
            write_atomic(to, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def predictions_of_test(config: RunConfig, model: Any, task: Task, outputs: Outputs) -> list[Prediction]:
    """Predictions for the task's test split, with the `expected` values; see `predictions`."""
    samples = prompts_of(task, task.test, config.task.max_length)
    return list(_with_expected(task, samples, predictions(config, model, task, samples, outputs)))


def _chosen_samples(config: RunConfig, task: Task, input: str | None, text: str | None) -> Dataset:
    if text is not None:
        return text_samples(config, task, text)
    if input is not None:
        return file_samples(config, task, input)
    return prompts_of(task, task.test, config.task.max_length)


def _chosen_model(config: RunConfig, task: Task, adapter: str | None) -> Any:
    if adapter is not None:
        return adapted_model(config, task, adapter)[0]
    model, new = build_model(config, task, config.search.seeds[0])
    if new:
        fault = f"missing, and {config.model.path} has no head for this task: a new head is random"
        raise InputError(fault, "adapter=DIR among the arguments", "adapter")
    log.info("without adapter=, the base model predicts")
    return model


def predictions(
    config: RunConfig,
    model: Any,
    task: Task,
    samples: Dataset,
    outputs: Outputs | None = None,
    advance: Callable[[int], object] | None = None,
) -> list[Prediction]:
    """One prediction for each sample, in order, on every rank. Collective.

    - sequence-classification: `class`, the likeliest one, and `probabilities` by class.
    - regression: `value`.
    - multiple-choice: `choice`, from 0, its `text`, and the `scores` of all choices: the sum of a choice's log
      likelihoods, or with the metric `accuracy_norm` their mean over its tokens. The largest score wins.
    - sft, causal-lm: `completion`, at most `task.max_new_tokens` likeliest tokens, and `ended`: whether the last token
      is an end token. For causal-lm it continues the text.

    Args:
        samples: samples from `file_samples` or `prompts_of`.
        outputs: an evaluation's outputs for the same samples, to be used again.
        advance: called with the number of new completions on this rank.

    Returns:
        `row` and the keys above, for each sample.

    Raises:
        InputError: a prompt and its completion do not fit the model's positions.
        TrainingError: a prediction is NaN or infinite.
    """
    outputs, size = outputs or Outputs(), config.train.eval_batch_size
    to_gpu(model)
    with watched():
        if not task.is_language:
            if outputs.logits is None:
                outputs.logits = sample_logits(model, task, samples, size)
            found = _labels(task, samples, outputs.logits)
        elif task.kind == "multiple-choice":
            if outputs.choices is None:
                outputs.choices = measure_choices(model, task, samples, size)
            found = _choices(task, samples, outputs.choices)
        else:
            found = _completions(model, task, samples, size, outputs, advance)
        return [{"row": row, **each} for row, each in zip(samples["row"], found, strict=True)]


def _labels(task: Task, samples: Dataset, logits_NC: Tensor) -> Iterator[Prediction]:
    broken = (~logits_NC.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise TrainingError(f"a logit of row {samples[broken[0]]['row']} is not finite ({len(broken)} rows in all)")
    if task.kind == "regression":
        yield from ({"value": value} for value in logits_NC[:, 0].tolist())
        return
    for best, shares in zip(logits_NC.argmax(1).tolist(), logits_NC.softmax(1).tolist(), strict=True):
        yield {"class": task.label_names[best], "probabilities": dict(zip(task.label_names, shares, strict=True))}


def _choices(task: Task, samples: Dataset, table_NC: Tensor) -> Iterator[Prediction]:
    scores = choice_scores(samples, table_NC, task.metric)
    for choices, prompts, own in zip(samples["choices"], samples["choice_prompts"], scores, strict=True):
        best = own.index(max(own))
        text = str(task.tokenizer.decode(choices[best][prompts[best] :], skip_special_tokens=True)).strip()
        yield {"choice": best, "text": text, "scores": own}


def _completions(
    model: Any,
    task: Task,
    samples: Dataset,
    batch_size: int,
    outputs: Outputs,
    advance: Callable[[int], object] | None,
) -> Iterator[Prediction]:
    own = model.generation_config.eos_token_id
    answers = AnswerEnds(task.tokenizer, samples, own) if task.kind == "sft" else None
    ends = _text_ends(task, own) if answers is None else answers.tokens
    if outputs.generated is None:
        prompts = [ids[:count] for ids, count in zip(samples["input_ids"], samples["prompt_length"], strict=True)]
        _check_positions(model, task, prompts, samples["row"])
        outputs.generated = generate_greedily(model, task, prompts, ends, batch_size, advance)
    for place, tokens in enumerate(outputs.generated):
        ended = bool(tokens) and tokens[-1] in ends
        if answers is None:
            completion = str(task.tokenizer.decode(tokens[: len(tokens) - ended], skip_special_tokens=True))
        else:
            completion = answers.answer(place, tokens)
        yield {"completion": completion, "ended": ended}


def _text_ends(task: Task, own: int | list[int] | None) -> list[int]:
    """End-of-sequence tokens of the tokenizer and of the model's generation settings."""
    return sorted(end_tokens(own) | {end for end in [task.tokenizer.eos_token_id] if end is not None})


def _check_positions(model: Any, task: Task, prompts: list[list[int]], rows: list[int]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda place: len(prompts[place]))
    size = len(prompts[longest])
    if limit is not None and 0 < limit < size + task.max_new_tokens:
        fault = f"found {task.max_new_tokens} after a prompt of {size} tokens (row {rows[longest]})"
        raise InputError(fault, f"at most {limit} tokens in all, the model's positions", "task.max_new_tokens")


def _with_expected(task: Task, samples: Dataset, found: list[Prediction]) -> Iterator[Prediction]:
    """Predictions, with the label or answer of the data as `expected`; causal-lm has none."""
    if task.kind == "causal-lm":
        yield from found
        return
    for each, expected in zip(found, samples["answer" if task.is_language else "labels"], strict=True):
        yield {**each, "expected": task.label_names[expected] if task.label_names else expected}
