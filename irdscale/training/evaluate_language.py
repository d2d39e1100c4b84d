"""Metrics of a language model: perplexity of texts, accuracy of choices, exact match of generated answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import eq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from irdscale.distributed.ranks import all_reduce_sum, largest_of, rank_and_world
from irdscale.distributed.zero3 import device_of, gathering, is_partitioned
from irdscale.errors import TrainingError
from irdscale.fisher.capture import frozen
from irdscale.models.batches import LateRows, shared_batches
from irdscale.models.checks import FIRST, padding_matters, require_causal, uneven_rows, warn_once
from irdscale.models.chunked_losses import (
    IGNORED,
    Headless,
    finishing,
    headless,
    measured_tokens,
    next_tokens,
    own_forward,
    target_places,
    token_losses,
)
from irdscale.tasks.answers import AnswerEnds, same_answer
from irdscale.tasks.metrics.errors import of_ratio, of_share
from irdscale.tasks.outputs import Outputs
from irdscale.tasks.tokens import labelled, pad_batch

if TYPE_CHECKING:
    from datasets import Dataset

    from irdscale.tasks import Task

# Columns of a text: sum of its target tokens' losses, number of target tokens, number of right predictions.
COLUMNS = 3


def evaluate_language(
    model: nn.Module, task: Task, split: Dataset, batch_size: int, outputs: Outputs | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Every metric of the task on a split, and its standard error; see `evaluate_with_errors`.

    - perplexity: exp of the mean loss of the split's target tokens.
    - token_accuracy: share of the target tokens that are the model's likeliest.
    - exact_match: share of the samples whose greedily decoded answer is the expected one (see `same_answer`). The
      model's `generation_config` gives only end-of-sequence tokens.
    - accuracy, accuracy_norm: share of the samples whose right choice is the likeliest, by the sum or the mean of its
      tokens' log likelihoods.

    Args:
        outputs: receives the measured choices or the generated answers.
    """
    outputs = outputs or Outputs()
    if task.kind == "multiple-choice":
        outputs.choices = measure_choices(model, task, split, batch_size)
        return _choice_accuracies(task, split, outputs.choices)
    table_NC = _text_table(model, task, list(zip(split["input_ids"], split["labels"], strict=True)), batch_size)
    loss_N, tokens_N, right_N = table_NC.unbind(1)
    loss, tokens, right = table_NC.sum(0).tolist()
    mean = loss / tokens
    # A perplexity that overflows is infinite, so its candidate is never the best.
    metrics = {"perplexity": math.exp(mean) if mean < 700 else math.inf, "token_accuracy": right / tokens}
    errors = {
        "perplexity": metrics["perplexity"] * of_ratio(loss_N, tokens_N),
        "token_accuracy": of_ratio(right_N, tokens_N),
    }
    if "exact_match" in task.metrics:
        metrics["exact_match"] = _exact_match(model, task, split, batch_size, outputs)
        errors["exact_match"] = of_share(metrics["exact_match"], len(split))
    return {name: metrics[name] for name in task.metrics}, {name: errors[name] for name in task.metrics}


def measure_choices(model: nn.Module, task: Task, split: Dataset, batch_size: int) -> Tensor:
    """Loss, tokens and right tokens of each choice [all choices, 3], in order of the samples, float64, on every rank.

    Raises:
        TrainingError: a choice's loss is NaN or infinite.
    """
    texts: list[tuple[list[int], list[int]]] = []
    for sample, prompts in zip(split["choices"], split["choice_prompts"], strict=True):
        texts += [(ids, labelled(ids, prompt)) for ids, prompt in zip(sample, prompts, strict=True)]
    return _text_table(model, task, texts, batch_size)


def choice_scores(split: Dataset, table_NC: Tensor, metric: str) -> list[list[float]]:
    """Log likelihood of each sample's choices, with `accuracy_norm` per token, from the table of `measure_choices`."""
    scores_N = -table_NC[:, 0] / (table_NC[:, 1] if metric == "accuracy_norm" else 1)
    return [own.tolist() for own in scores_N.split([len(choices) for choices in split["choices"]])]


def _choice_accuracies(task: Task, split: Dataset, table_NC: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    metrics = {}
    for name in task.metrics:
        likeliest = [own.index(max(own)) for own in choice_scores(split, table_NC, name)]
        metrics[name] = sum(map(eq, likeliest, split["answer"])) / len(split)
    return metrics, {name: of_share(share, len(split)) for name, share in metrics.items()}


def _text_table(model: nn.Module, task: Task, texts: Sequence[tuple[list[int], list[int]]], batch_size: int) -> Tensor:
    """Loss, target tokens and right predictions of each text [N, 3], float64, on every rank.

    Raises:
        TrainingError: a text's loss is NaN or infinite.
    """
    pad = task.tokenizer.pad_token_id
    device, table_NC = device_of(model), torch.zeros(len(texts), COLUMNS, dtype=torch.float64)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in texts]
    with own_forward(model), gathering(model), frozen(model), torch.no_grad():
        first = pad_batch(rows[:1], pad)
        require_causal(model, first)
        parts = headless(model, first)

        def measure(places: list[int]) -> None:
            batch = pad_batch([rows[i] for i in places or [0]], pad)
            places_K = target_places(batch["labels"]).to(device, non_blocking=True)
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            targets_BT = next_tokens(batch.pop("labels"))
            loss_BT, right_BT = _measured(model, parts, batch, targets_BT, places_K)
            if places:
                there_BT = targets_BT != IGNORED
                columns = (loss_BT.double().sum(1), there_BT.sum(1), (right_BT & there_BT).sum(1))
                measured.add(places, torch.stack([column.double() for column in columns], 1))

        measured = LateRows(table_NC)
        shared_batches(model, [len(ids) for ids, _ in texts], batch_size, measure)
        measured.read()
    all_reduce_sum([table_NC])
    broken = (~table_NC.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise TrainingError(f"the model's loss of text {broken[0]} is not finite ({len(broken)} of {len(texts)} texts)")
    return table_NC


def _measured(
    model: nn.Module, parts: Headless | None, inputs: dict[str, Any], targets_BT: Tensor, places_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of each target [B, T], and whether it is the model's likeliest token [B, T].

    Args:
        places_K: flat positions of the targets.
    """
    if parts is None:
        logits_BTV = model(**inputs).logits
        return token_losses(logits_BTV, targets_BT), logits_BTV.argmax(-1) == targets_BT

    def finish(hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return measured_tokens(parts.head, hidden_BTD, targets_BT, places_K)

    with finishing(model, parts, finish):
        found: tuple[Tensor, Tensor] = model(**inputs)
    return found


def _exact_match(model: Any, task: Task, split: Dataset, batch_size: int, outputs: Outputs) -> float:
    answers = list(split["answer"])
    ends = AnswerEnds(task.tokenizer, split, model.generation_config.eos_token_id)
    prompts = [ids[:prompt] for ids, prompt in zip(split["input_ids"], split["prompt_length"], strict=True)]
    outputs.generated = generate_greedily(model, task, prompts, ends.tokens, batch_size)
    found = [ends.answer(place, tokens) for place, tokens in enumerate(outputs.generated)]
    return sum(map(same_answer, found, answers)) / len(answers)


def generate_greedily(
    model: Any,
    task: Task,
    prompts: Sequence[list[int]],
    ends: list[int],
    batch_size: int,
    advance: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """Generate the likeliest tokens after each prompt, in batches of prompts of similar lengths. Collective.

    Prompts of different lengths are padded on the left, unless that changes the generated tokens.

    Args:
        prompts: tokens of each prompt, at least one.
        ends: tokens that end an answer.
        advance: called with the number of prompts answered on this rank.

    Returns:
        Generated tokens of each prompt, on every rank: at most `task.max_new_tokens`, including the first of `ends`.
    """
    pad, device = task.tokenizer.pad_token_id, device_of(model)
    rows = [{"input_ids": tokens} for tokens in prompts]
    # Tokens are stored as token + 1. 0 means no token, so the sum over the ranks combines their rows.
    table_NT = torch.zeros(len(prompts), task.max_new_tokens, dtype=torch.int64)

    def answer(places: list[int]) -> None:
        batch = pad_batch([rows[i] for i in places or [0]], pad, side="left")
        generated_BT = model.generate(
            **{k: v.to(device) for k, v in batch.items()},
            # Ranks gather partitions together, so all continue until the last one is done.
            synced_gpus=is_partitioned(model) and rank_and_world()[1] > 1,
        )
        if places:
            new_BT = generated_BT[:, batch["input_ids"].shape[1] :]
            table_NT[places, : new_BT.shape[1]] = new_BT.cpu() + 1
            if advance is not None:
                advance(len(places))

    with own_forward(model), _greedy(model, task, ends), gathering(model), frozen(model), torch.no_grad():
        equal = batch_size > 1 and _left_padding_matters(model, task.tokenizer, rows)
        if equal:
            warn_once(
                f"train.eval_batch_size: what {type(model).__name__} generates depends on how far its batch is padded; "
                f"batches hold prompts of equal length"
            )
        shared_batches(model, [len(tokens) for tokens in prompts], batch_size, answer, equal=equal)
    all_reduce_sum([table_NT])
    return [_ended([token - 1 for token in row if token], ends) for row in table_NT.tolist()]


def _ended(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first one that ends an answer, included."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _left_padding_matters(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> bool:
    """Whether the first generated token depends on a prompt's padding. Collective; call it inside `_greedy`."""

    def collate(some: list[dict[str, Any]]) -> dict[str, Any]:
        return pad_batch(some, tokenizer.pad_token_id, side="left")

    def first_logits(batch: dict[str, Any]) -> Tensor | None:
        try:
            found = model.generate(
                **{k: v.to(device_of(model)) for k, v in batch.items()},
                max_new_tokens=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
        except Exception:  # the evaluation raises the same error
            return None
        return found.logits[0]

    found = padding_matters(model, collate, uneven_rows(rows, collate, longest=FIRST), first_logits)
    return largest_of([bool(found)])[0] == 1


@contextmanager
def _greedy(model: Any, task: Task, ends: list[int]) -> Iterator[None]:
    """Make the model generate the likeliest tokens until one of `ends`, in the body.

    The model's generation settings are replaced: arguments of `generate` would not turn off their penalties.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        num_beams=1,
        # `frozen` turns the cache off for other passes.
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=task.tokenizer.pad_token_id,
        bos_token_id=own.bos_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own
