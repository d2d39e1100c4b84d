"""Samples for language models: texts, prompts with completions, chats, and prompts with choices.

A sample has tokens and labels. A label is -100 where the loss leaves it out, as at the first token.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa

from irdscale.config.kinds import Kind
from irdscale.config.task import ColumnsConfig, TaskConfig, may_read_chats
from irdscale.errors import InputError
from irdscale.models.chunked_losses import IGNORED
from irdscale.tasks.chat_templates import check_syntax
from irdscale.tasks.chats import chat_sample
from irdscale.tasks.choices import RightChoices, choice_texts
from irdscale.tasks.data import Rows
from irdscale.tasks.messages import conversations
from irdscale.tasks.splits import Part
from irdscale.tasks.tokens import labelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
BATCH = 1000
_TOKENS = pa.list_(pa.int32())
# Separators between a prompt and the text after it, unless the prompt ends in white space.
_JOINTS = {"sft": "\n", "multiple-choice": " "}


@dataclass(frozen=True)
class _Sample:
    """A sample's row, tokens and labels.

    Attributes:
        prompt_length: tokens before the last answer.
        answer: the expected answer, or the number of the right choice.
        choices: tokens and prompt length of each choice.
        opening: text that a chat template writes before the answer's content.
        ends: texts that end the answer in a chat.
        cut: whether it was longer than `task.max_length`.
    """

    row: int
    input_ids: list[int]
    labels: list[int]
    prompt_length: int = 0
    answer: Any = None
    choices: Sequence[tuple[list[int], int]] = ()
    opening: str = ""
    ends: Sequence[str] = ()
    cut: bool = False


def language_samples(
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    part: Part,
    task: TaskConfig,
    columns: ColumnsConfig,
    cut: list[int] | None = None,
) -> datasets.Dataset:
    """Tokenise the rows of `part` in memory, without padding.

    - causal-lm: a text, with the tokenizer's special tokens and the end-of-sequence token. A text longer than
      `task.max_length` is cut into several samples. Rows without text are left out.
    - sft: a prompt, a line break, and a completion with the end-of-sequence token, which are the labels; or a chat by
      the tokenizer's template, whose labels are all answers, or the last one (`task.train_on`).
    - multiple-choice: a prompt, a space and the right choice, which is the label.

    Args:
        cut: gets the rows that are cut, or cut into several samples.

    Returns:
        Columns `input_ids`, `labels` and `row` (of the source split). sft adds `prompt_length` (tokens before the last
        answer), `answer` (its text), `opening` (text that a chat template writes before its content) and `ends` (texts
        that end it). multiple-choice adds `prompt_length`, `answer` (number of the right choice), `choices` (tokens of
        the prompt and each choice) and `choice_prompts` (their prompt lengths).

    Raises:
        InputError: a column is missing or of the wrong type; or a row has nothing to learn, does not fit
            `task.max_length`, or is refused by the chat template. The error names the row.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"found a {type(tokenizer).__name__}, which does not say where tokens come from",
            "a fast tokenizer (tokenizer.json)",
            key="model.path",
        )
    if kind == "causal-lm":
        samples = list(_texts(tokenizer, rows, part, task.max_length, columns))
    elif kind == "multiple-choice":
        samples = list(_choices(tokenizer, rows, part, task, columns))
    elif may_read_chats(kind, columns):
        samples = list(_chats(tokenizer, rows, part, task, columns))
    else:
        samples = list(_completions(tokenizer, rows, part, task, columns))
    for sample in samples:
        if all(label == IGNORED for label in sample.labels):
            raise InputError(
                f"{rows.where}, row {sample.row}: found no token to learn after the first one, which no token predicts",
                "a prompt, or a longer text",
                key="task.dataset",
            )
    if not samples:
        raise InputError(f"{rows.where}: found no text in {len(part.rows)} rows", "some", key="task.dataset")
    if cut is not None:
        pieces = Counter(sample.row for sample in samples)
        cut += [sample.row for sample in samples if sample.cut or pieces[sample.row] > 1]
    return datasets.Dataset(_table(kind, samples))


def _table(kind: Kind, samples: Sequence[_Sample]) -> pa.Table:
    arrays: dict[str, pa.Array] = {
        "input_ids": pa.array([sample.input_ids for sample in samples], _TOKENS),
        "labels": pa.array([sample.labels for sample in samples], _TOKENS),
        "row": pa.array([sample.row for sample in samples]),
    }
    if kind != "causal-lm":
        arrays["prompt_length"] = pa.array([sample.prompt_length for sample in samples])
        arrays["answer"] = pa.array([sample.answer for sample in samples])
    if kind == "sft":
        arrays["opening"] = pa.array([sample.opening for sample in samples], pa.string())
        arrays["ends"] = pa.array([sample.ends for sample in samples], pa.list_(pa.string()))
    if kind == "multiple-choice":
        arrays["choices"] = pa.array([[ids for ids, _ in s.choices] for s in samples], pa.list_(_TOKENS))
        arrays["choice_prompts"] = pa.array([[prompt for _, prompt in s.choices] for s in samples], _TOKENS)
    return pa.table(arrays)


def packed(samples: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Join the texts of `samples` and cut them into blocks of `max_length` tokens; a shorter rest is left out.

    Raises:
        InputError: the texts are shorter than one block.
    """
    joined = [token for ids in samples["input_ids"] for token in ids]
    blocks = [joined[i : i + max_length] for i in range(0, len(joined) - max_length + 1, max_length)]
    if not blocks:
        raise InputError(
            f"found {len(joined)} tokens of text to train on", f"{max_length} (task.max_length)", key="task.packing"
        )
    labels = [[IGNORED, *block[1:]] for block in blocks]
    return datasets.Dataset(pa.table({"input_ids": pa.array(blocks, _TOKENS), "labels": pa.array(labels, _TOKENS)}))


def _ending(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-sequence token, if the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _texts(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, part: Part, max_length: int, columns: ColumnsConfig
) -> Iterator[_Sample]:
    assert columns.text is not None
    texts, end, empty = rows.texts(columns.text[0], "text"), _ending(tokenizer), 0
    for start in range(0, len(part.rows), BATCH):
        chosen = [int(row) for row in part.rows[start : start + BATCH] if texts[row].strip()]
        empty += min(BATCH, len(part.rows) - start) - len(chosen)
        encoded = tokenizer([texts[row] for row in chosen], verbose=False)["input_ids"] if chosen else []
        for row, tokens in zip(chosen, encoded, strict=True):
            tokens = tokens if tokens[-1:] == end else [*tokens, *end]
            for place in range(0, len(tokens), max_length):
                piece = tokens[place : place + max_length]
                # No token predicts the only token of a last piece.
                if len(piece) > 1:
                    yield _Sample(row, piece, [IGNORED, *piece[1:]])
    if empty:
        log.info("%s: %d of %d rows have no text and are left out", rows.where, empty, len(part.rows))


def _completions(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, part: Part, task: TaskConfig, columns: ColumnsConfig
) -> Iterator[_Sample]:
    assert columns.prompt is not None
    assert columns.completion is not None
    prompts = rows.texts(columns.prompt, "prompt")
    completions = rows.texts(columns.completion, "completion")
    for start in range(0, len(part.rows), BATCH):
        chosen = [int(row) for row in part.rows[start : start + BATCH]]
        for row in chosen:
            if not completions[row].strip():
                raise InputError(
                    f"{rows.where}, row {row}: found no text", "some, to learn from", key="task.columns.completion"
                )
        pairs = [(prompts[row], completions[row]) for row in chosen]
        end = _ending(tokenizer)
        encoded = _joined(tokenizer, pairs, _JOINTS["sft"], end)
        for row, (tokens, prompt) in zip(chosen, encoded, strict=True):
            if prompt >= len(tokens) - len(end):
                raise InputError(
                    f"{rows.where}, row {row}: found no token of the completion alone; the tokenizer "
                    "drops it, or joins it with the prompt (a prompt that ends in white space may part "
                    "them)",
                    key="task.columns.completion",
                )
            kept, prompt = _fitting(tokenizer, tokens, prompt, task, f"{rows.where}, row {row}")
            cut = len(kept) < len(tokens)
            yield _Sample(row, kept, labelled(kept, prompt), prompt, completions[row], cut=cut)


def _joined(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], joint: str, end: list[int]
) -> list[tuple[list[int], int]]:
    """Tokens of each pair, tokenised as one text, and the number of tokens that begin before the second text."""
    firsts = [first if first[-1:].isspace() or not first else first + joint for first, _ in pairs]
    texts = [first + second for first, (_, second) in zip(firsts, pairs, strict=True)]
    encoded = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    found = []
    for first, tokens, offsets in zip(firsts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # A token belongs to the text in which it begins. It may begin with spaces before the second text, or join white
        # space with the second text. Special tokens have offsets (0, 0).
        begins, blank, joined = len(first.rstrip(" ")), len(first.rstrip()), len(first)
        behind = (
            place
            for place, (start, stop) in enumerate(offsets)
            if begins <= start < stop or blank <= start < joined < stop
        )
        prompt = next(behind, len(tokens))
        found.append((tokens if tokens[-1:] == end else [*tokens, *end], prompt))
    return found


def _fitting(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], prompt: int, task: TaskConfig, where: str
) -> tuple[list[int], int]:
    """Tokens and prompt length of a sample, cut from the left to `task.max_length` with `task.truncate=left`."""
    over = len(tokens) - task.max_length
    if over <= 0:
        return tokens, prompt
    key = "task.columns.prompt"
    if task.truncate != "left":
        raise InputError(
            f"{where}: found {len(tokens)} tokens with what follows the prompt",
            f"at most {task.max_length} (task.max_length), or task.truncate=left",
            key=f"{key}",
        )
    first = int(tokens[0] == tokenizer.bos_token_id)
    if prompt - over < first + 1:
        raise InputError(
            f"{where}: found {len(tokens) - prompt} tokens behind the prompt",
            f"at most {task.max_length - first - 1}, so that some of the prompt is left (task.max_length)",
            key=f"{key}",
        )
    return [*tokens[:first], *tokens[first + over :]], prompt - over


def _choices(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, part: Part, task: TaskConfig, columns: ColumnsConfig
) -> Iterator[_Sample]:
    assert columns.prompt is not None
    assert columns.label is not None
    prompts = rows.texts(columns.prompt, "prompt")
    choices = choice_texts(rows, columns.choices or [])
    numbers = RightChoices(rows, columns, choices)
    for row in map(int, part.rows):
        where = f"{rows.where}, row {row}"
        if len(choices[row]) < 2 or not all(choice.strip() for choice in choices[row]):
            raise InputError(f"{where}: found {choices[row]}", "two texts or more", key="task.columns.choices")
        label = numbers.number(row)
        pairs = [(prompts[row], choice) for choice in choices[row]]
        whole = _joined(tokenizer, pairs, _JOINTS["multiple-choice"], [])
        encoded = [_fitting(tokenizer, tokens, prompt, task, where) for tokens, prompt in whole]
        if not all(prompt for _, prompt in encoded):
            # Without a prompt, no token predicts the first token of a choice.
            raise InputError(
                f"{where}: found a prompt without tokens", "some text before the choices", key="task.columns.prompt"
            )
        for choice, (tokens, prompt) in zip(choices[row], encoded, strict=True):
            if prompt == len(tokens):
                raise InputError(f"{where}: found {choice!r}, without tokens", "some text", key="task.columns.choices")
        tokens, prompt = encoded[label]
        cut = any(len(tokens) > task.max_length for tokens, _ in whole)
        yield _Sample(row, tokens, labelled(tokens, prompt), prompt, label, encoded, cut=cut)


def _chats(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, part: Part, task: TaskConfig, columns: ColumnsConfig
) -> Iterator[_Sample]:
    key = next(key for key in ("messages", "system", "instruction") if key in columns.named())
    if tokenizer.chat_template is None:
        raise InputError(
            f"found {getattr(columns, key)!r}, but the model's tokenizer has no chat template",
            "one, or task.chat_template, or task.columns {prompt: .., completion: ..}",
            key=f"task.columns.{key}",
        )
    check_syntax(tokenizer, task.chat_template)
    read, other_prompts = conversations(rows, columns), []
    for row in map(int, part.rows):
        found = read(row)
        chat = chat_sample(tokenizer, found.messages, found.where, found.tools, task.train_on == "last")
        tokens, prompt = _fitting(tokenizer, chat.input_ids, chat.prompt_length, task, f"{rows.where}, row {row}")
        labels = [IGNORED, *chat.labels[len(chat.labels) - len(tokens) + 1 :]]
        if not chat.as_asked:
            other_prompts.append(row)
        cut = len(tokens) < len(chat.input_ids)
        yield _Sample(row, tokens, labels, prompt, chat.answer, opening=chat.opening, ends=chat.ends, cut=cut)
    if other_prompts:
        log.warning(
            "%s: %d of %d chats, such as row %d: the chat template writes another prompt before the last answer than "
            "when it asks for that answer; training and evaluation use the former",
            rows.where,
            len(other_prompts),
            len(part.rows),
            other_prompts[0],
        )
