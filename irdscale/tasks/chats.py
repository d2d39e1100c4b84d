"""Samples from chats: their tokens by the tokenizer's template, with those of the answers as labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from irdscale.errors import InputError
from irdscale.models.chunked_losses import IGNORED
from irdscale.tasks.answer_places import Text, added_tokens, answer_place, around, tokens_of
from irdscale.tasks.chat_templates import CONTENTS, ChatWriter, Message, shared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Chat:
    """A chat's tokens and labels.

    Attributes:
        input_ids: tokens.
        labels: tokens of the answers; `IGNORED` elsewhere.
        prompt_length: tokens before the last answer.
        answer: text of the last answer.
        opening: text that the template writes between the prompt and the content of the last answer.
        ends: texts that end the last answer.
        as_asked: whether the chat begins with the template's generation prompt for the last answer.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    answer: str
    opening: str
    ends: list[str]
    as_asked: bool = True


def chat_sample(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    tools: Sequence[dict[str, Any]] | None = None,
    last_only: bool = False,
) -> Chat:
    """The sample of a chat that ends with a message of the assistant.

    Labels are the text that the template marks by `{% generation %}`. Without marks they are each answer, with the text
    that ends its turn. A token that overlaps an answer is a label, even if it begins with white space before it.

    Args:
        where: name of the row, for errors.
        tools: JSON schemas of the functions that the assistant may call.
        last_only: learn only the last answer.

    Raises:
        InputError: the template refuses the chat, an answer is not found in its text, or one token joins an answer with
            other text. The error names the message.
    """
    messages = list(messages)
    writer = ChatWriter(tokenizer, where, tools)
    chat = Text(tokenizer, writer.write(messages))
    marked, last = writer.marked(messages, chat.text), len(messages) - 1
    if marked is None:
        numbers = [last] if last_only else [i for i, each in enumerate(messages) if each["role"] == "assistant"]
        places = [answer_place(writer, chat, messages, number) for number in numbers]
        learnt, prompt, begin = [(place.first, place.stop) for place in places], places[-1].first, places[-1].begin
    else:
        learnt, prompt, begin = _marked_ranges(writer, chat, messages, marked, last_only)
    labels = [IGNORED] * len(chat.tokens)
    for first, stop in learnt:
        labels[first:stop] = chat.tokens[first:stop]
    asked = writer.tried(messages[:-1], asking=True) if last else None
    answer = _last_answer(writer, chat, messages, chat.text[:begin])
    return Chat(chat.tokens, labels, prompt, *answer, as_asked=asked is None or chat.text.startswith(asked))


def _marked_ranges(
    writer: ChatWriter, chat: Text, messages: list[Message], marked: list[tuple[int, int]], last_only: bool
) -> tuple[list[tuple[int, int]], int, int]:
    """Token range of each marked text, and begin of the last answer, as a token and as a character.

    A mark may begin inside the generation prompt. The prompt still extends to the end of the generation prompt.
    """
    if not marked:
        raise InputError(
            "the chat template marks nothing of it as generated",
            "{% generation %} around the messages of the assistant",
            where=writer.where,
        )
    learnt = [chat.places(*span, writer.where) for span in marked]
    try:
        place = answer_place(writer, chat, messages, len(messages) - 1)
        prompt, begin = place.first, place.begin
    except InputError:
        prompt, begin = learnt[-1][0], marked[-1][0]
    if last_only:
        learnt = [each for each, (_, end) in zip(learnt, marked, strict=True) if end > begin]
    return learnt, prompt, begin


def _last_answer(writer: ChatWriter, chat: Text, messages: list[Message], before: str) -> tuple[str, str, list[str]]:
    """Text of the last answer, text that the template writes before its content, and texts that end the answer."""
    tokenizer, text, message = chat.tokenizer, chat.text, messages[-1]
    content = message.get("content", "")
    head, tail = around(writer, messages[:-1]) or (before, "")
    opening = head[len(before) :] if head.startswith(before) else ""
    if not text.endswith(tail):
        # Calls of tools end differently from texts: the last special token ends them.
        written = text.rstrip()
        special = (str(tokenizer.convert_ids_to_tokens(token)) for token in added_tokens(tokenizer))
        tail = max((t for t in special if written.endswith(t)), key=len, default="") + text[len(written) :]
    ends = [tail] if tail else []
    if not tail.strip():
        # Without an ending of its own, an answer ends where the next turn begins.
        first, second = (writer.tried([*messages, {"role": "user", "content": each}]) or "" for each in CONTENTS)
        header = first[len(text) : shared(first, second)]
        if first.startswith(text) and header.strip():
            ends.append(tail + header)
    close, written = _closing_token(tokenizer, opening), text[len(before) : len(text) - len(tail)]
    if close and close in written and (close in content or not text.startswith(head)):
        # The answer has a thought in the place of the template's empty one. The text after the thought is the answer.
        said = written.rpartition(close)[2].strip()
        if said and not message.get("tool_calls"):
            return said, opening, ends
    if not text.startswith(head):
        head, opening = before, ""
    if not content.strip() or message.get("tool_calls"):
        written = text[len(head) : len(text) - len(tail)]
        content = str(tokenizer.decode(tokens_of(tokenizer, written))).strip()
    return content, opening, ends


def _closing_token(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The last token of a text, without white space, if it is an added token; else the empty text."""
    tokens = tokens_of(tokenizer, text.rstrip()) if text.strip() else []
    return str(tokenizer.convert_ids_to_tokens(tokens[-1])) if tokens and tokens[-1] in added_tokens(tokenizer) else ""
