"""Chats as a tokenizer's template writes them: the tokens of the answers, and what stands around the last one."""

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
    """A chat's tokens, and those of the assistant's messages as labels.

    `prompt_length` counts the tokens before the last answer. `opening` is what the template writes between that prompt
    and the answer's content; `ends` are the texts by which it ends the answer. `as_asked` says whether that prompt is
    what the template writes when it asks for the answer.
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
    """The tokens of a chat that ends with a message of the assistant.

    What the template marks as generated is learnt (`{% generation %}`); where it marks nothing, each answer is, with
    what the template writes behind it until the next message. A token that reaches into an answer is learnt with it,
    though it begins with white space of what stands before.

    Args:
        where: names the row, for messages.
        tools: descriptions of the functions that the assistant may call, for the template.
        last_only: learn the last answer alone.

    Raises:
        InputError: the template refuses the chat, it does not show where an answer is, or one token joins an answer
            with other text; names the message.
    """
    messages = list(messages)
    writer = ChatWriter(tokenizer, where, tools)
    whole = Text(tokenizer, writer.write(messages))
    marked, last = writer.marked(messages, whole.text), len(messages) - 1
    if marked is None:
        numbers = [last] if last_only else [i for i, each in enumerate(messages) if each["role"] == "assistant"]
        places = [answer_place(writer, whole, messages, number) for number in numbers]
        learnt, prompt, begin = [(place.first, place.stop) for place in places], places[-1].first, places[-1].begin
    else:
        learnt, prompt, begin = _marked_places(writer, whole, messages, marked, last_only)
    labels = [IGNORED] * len(whole.tokens)
    for first, stop in learnt:
        labels[first:stop] = whole.tokens[first:stop]
    asked = writer.tried(messages[:-1], asking=True) if last else None
    answer = _last_answer(writer, whole, messages, whole.text[:begin])
    return Chat(whole.tokens, labels, prompt, *answer, as_asked=asked is None or whole.text.startswith(asked))


def _marked_places(
    writer: ChatWriter, whole: Text, messages: list[Message], marked: list[tuple[int, int]], last_only: bool
) -> tuple[list[tuple[int, int]], int, int]:
    """First token and first one behind of each marked text; where the last answer begins, as a token and in the text.

    Marks may begin within what asks for an answer; a prompt goes on to the end of that.
    """
    if not marked:
        raise InputError(
            "the chat template marks nothing of it as generated",
            "{% generation %} around the messages of the assistant",
            where=writer.where,
        )
    learnt = [whole.places(*span, writer.where) for span in marked]
    try:
        place = answer_place(writer, whole, messages, len(messages) - 1)
        prompt, begin = place.first, place.begin
    except InputError:
        prompt, begin = learnt[-1][0], marked[-1][0]
    if last_only:
        learnt = [each for each, (_, end) in zip(learnt, marked, strict=True) if end > begin]
    return learnt, prompt, begin


def _last_answer(writer: ChatWriter, whole: Text, messages: list[Message], before: str) -> tuple[str, str, list[str]]:
    """The last answer as text, what the template writes before its content, and the texts by which it ends."""
    tokenizer, text, message = whole.tokenizer, whole.text, messages[-1]
    content = message.get("content", "")
    head, tail = around(writer, messages[:-1]) or (before, "")
    opening = head[len(before) :] if head.startswith(before) else ""
    if not text.endswith(tail):
        # Calls of tools end in another way than texts: by the last special token.
        written = text.rstrip()
        special = (str(tokenizer.convert_ids_to_tokens(token)) for token in added_tokens(tokenizer))
        tail = max((t for t in special if written.endswith(t)), key=len, default="") + text[len(written) :]
    ends = [tail] if tail else []
    if not tail.strip():
        # The next turn begins behind the answer, where nothing else does.
        first, second = (writer.tried([*messages, {"role": "user", "content": each}]) or "" for each in CONTENTS)
        header = first[len(text) : shared(first, second)]
        if first.startswith(text) and header.strip():
            ends.append(tail + header)
    close, written = _last_added(tokenizer, opening), text[len(before) : len(text) - len(tail)]
    if close and close in written and (close in content or not text.startswith(head)):
        # A thought of the answer's own stands where a template writes an empty one: what is behind it is the answer.
        said = written.rpartition(close)[2].strip()
        if said and not message.get("tool_calls"):
            return said, opening, ends
    if not text.startswith(head):
        head, opening = before, ""
    if not content.strip() or message.get("tool_calls"):
        written = text[len(head) : len(text) - len(tail)]
        content = str(tokenizer.decode(tokens_of(tokenizer, written))).strip()
    return content, opening, ends


def _last_added(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The token that a text ends with, white space aside, where that is an added one; else nothing."""
    tokens = tokens_of(tokenizer, text.rstrip()) if text.strip() else []
    return str(tokenizer.convert_ids_to_tokens(tokens[-1])) if tokens and tokens[-1] in added_tokens(tokenizer) else ""
