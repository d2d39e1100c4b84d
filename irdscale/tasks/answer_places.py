"""Positions of a chat's answers in the text that its template writes, and in the tokens of that text.

Most templates append: the chat up to an answer, and the prompt for that answer, are prefixes of the full chat. Their
lengths give the end and the begin of the answer. Other templates write earlier messages differently when the
chat goes on: Qwen 3's drops thoughts, Mistral's moves the system prompt. For these, the text after each message's
content locates the answers. Two renderings with different contents show where a content is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from irdscale.errors import InputError
from irdscale.tasks.chat_templates import CONTENTS, ChatWriter, Message, shared, shared_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Most characters of a template's text in an error message.
_SHOWN = 30
LAST_ONLY = "task.train_on: last"


class Text:
    """A rendered text and its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.tokens = tokens_of(tokenizer, text)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Begin and end of each token in the text, with the white space before it that some tokenizers trim."""
        found = self.tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans, reached = [], 0
        for start, stop in found["offset_mapping"]:
            if start > reached:
                start = reached + len(self.text[reached:start].rstrip())
            reached = max(reached, stop)
            spans.append((start, stop))
        return spans

    def complete(self, begin: int, end: int) -> int:
        """End of the last complete token between two characters, with the white space after it.

        Added tokens end messages, so only they count if there are any.
        """
        added = added_tokens(self.tokenizer)
        inside = [
            (stop, token in added)
            for (start, stop), token in zip(self.spans, self.tokens, strict=True)
            if begin <= start < stop <= end
        ]
        stops = [stop for stop, ends in inside if ends] or [stop for stop, _ in inside]
        place = max(stops, default=begin)
        return end - len(self.text[place:end].lstrip())

    def places(self, begin: int, end: int, where: str) -> tuple[int, int]:
        """Tokens of an answer, as a half-open range.

        A token that overlaps the answer belongs to it, even if it begins with white space before the answer.

        Args:
            begin, end: first character of the answer, and the one after its last.
            where: name of the message, for errors.

        Raises:
            InputError: one token joins the answer with other text, or the answer has no token.
        """
        own = []
        for place, (start, stop) in enumerate(self.spans):
            if start < stop and (stop <= begin or end <= start):
                continue
            inside = self.text[max(start, begin) : min(stop, end)]
            outside = self.text[start : min(stop, begin)] + self.text[max(start, end) : stop]
            if inside.strip() and outside.strip():
                raise InputError(
                    f"the tokenizer joins {self.text[start:stop]!r} in one token, of which only {inside!r} belongs to "
                    f"the answer",
                    "a template that ends prompts and answers with special tokens or white space",
                    where=where,
                )
            if (inside and not outside.strip()) or (start == stop and begin <= start < end):
                own.append(place)
        if not own:
            raise InputError("found an answer without tokens", "some text, to learn from", where=where)
        return own[0], own[-1] + 1


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text, without the special tokens that a tokenizer adds: chat templates write their own."""
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Special tokens, and other tokens that were added to the vocabulary."""
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


@dataclass(frozen=True)
class Place:
    """An answer in a chat: its tokens [first, stop), and the character at which it begins."""

    first: int
    stop: int
    begin: int


def answer_place(writer: ChatWriter, chat: Text, messages: Sequence[Message], number: int) -> Place:
    """Position of message `number`, an answer, in the chat.

    Raises:
        InputError: the template refuses a part of the chat, or writes the answer differently when the chat goes on or
            after a generation prompt; or one token joins the answer with other text. The error names the message.
    """
    try:
        return place_by_prefixes(writer, chat, messages, number)
    except InputError as error:
        place = place_by_contents(writer, chat, messages, number)
        if place is not None:
            return place
        if number + 1 == len(messages):
            raise
        expected = f"{error.expected}, or {LAST_ONLY}" if error.expected else LAST_ONLY
        raise InputError(error.found, expected, error.key, error.where) from error


def place_by_prefixes(writer: ChatWriter, chat: Text, messages: Sequence[Message], number: int) -> Place:
    """Position of an answer, from the lengths of the prompt and of the chat up to the answer.

    Raises:
        InputError: these texts are not prefixes of the chat; or as `Text.places`.
    """
    where = f"{writer.where}: message {number}"
    until = chat.text if number + 1 == len(messages) else writer.write(messages[: number + 1])
    before = text_before(writer, messages[:number], until)
    tokens, first = chat.tokens, tokens_of(chat.tokenizer, before)
    last = tokens if until == chat.text else tokens_of(chat.tokenizer, until)
    if tokens[: len(last)] == last and last[: len(first)] == first and len(first) < len(last):
        return Place(len(first), len(last), len(before))
    if until == before:
        raise InputError("the chat template writes no text for this answer", "some text, to learn from", where=where)
    if not until.startswith(before):
        place = shared(before, until)
        raise InputError(
            f"the chat template asks for an answer with {before[place:][:_SHOWN]!r}, where it writes "
            f"{until[place:][:_SHOWN]!r} when there is one",
            "a template whose answers follow its prompt",
            where=where,
        )
    if not chat.text.startswith(until):
        raise InputError(
            "the chat template renders it in another way when the chat goes on", "a template that appends", where=where
        )
    return Place(*chat.places(len(before), len(until), where), len(before))


def text_before(writer: ChatWriter, messages: Sequence[Message], text: str) -> str:
    """Text before an answer to `messages`: the generation prompt, or the beginning of `text` if there is none.

    Args:
        text: the chat with the answer.

    Raises:
        InputError: the template writes neither a generation prompt nor the content of an answer.
    """
    # Templates refuse a generation prompt after no messages, and some refuse it after a system prompt alone.
    asked = writer.tried(messages, asking=True) if messages else None
    if asked is not None:
        return asked
    found = around(writer, messages)
    if found is None:
        raise InputError(
            f"the chat template does not show where an answer to {len(messages)} messages begins",
            "a chat that begins with a message of the user",
            where=f"{writer.where}: message {len(messages)}",
        )
    before = text[: shared(text, found[0])]
    question = [{"role": "user", "content": CONTENTS[0]}]
    asked, plain = (writer.tried(question, asking) for asking in (True, False))
    if asked is not None and plain is not None and asked.startswith(plain):
        # Text between the header and the content, such as an empty thought, belongs to the answer.
        header = asked[len(plain) :]
        place = before.rfind(header) if header.strip() else -1
        before = before[: place + len(header)] if place >= 0 else before
    return before


def around(writer: ChatWriter, messages: Sequence[Message]) -> tuple[str, str] | None:
    """Text before and after the content of an answer to `messages`; None if the template does not write the content."""
    answered = [*messages, {"role": "assistant", "content": ""}]
    both = writer.varied(answered, len(messages)).get("content")
    return None if both is None else (both[0][: shared(*both)], shared_end(*both))


def place_by_contents(writer: ChatWriter, chat: Text, messages: Sequence[Message], number: int) -> Place | None:
    """Position of an answer, from the text after the contents of messages; None if that text is not found.

    Raises:
        InputError: as `Text.places`.
    """
    begin, end = _first_character(writer, chat, messages, number), _end_character(writer, chat, messages, number)
    if begin is None or end is None or begin >= end:
        return None
    return Place(*chat.places(begin, end, f"{writer.where}: message {number}"), begin)


def _first_character(writer: ChatWriter, chat: Text, messages: Sequence[Message], number: int) -> int | None:
    """First character of an answer: where the generation prompt after the message before it ends."""
    text = chat.text
    asked = writer.tried(messages[:number], asking=True) if number else None
    if asked is None:
        found = around(writer, messages[:number])
        # Before the first answer there is no text that the template could write differently.
        if found is None or (number and not text.startswith(found[0])):
            return None
        return len(text_before(writer, messages[:number], text))
    found = _texts_after(writer, (messages, text, False), (messages[:number], asked, True), number - 1)
    if found is None:
        return None
    here, there = found
    alike, content = shared(here, there), len(text) - len(here)
    if alike == len(there):
        return content + alike
    if number + 1 == len(messages):
        return None
    # A generation prompt may contain text, such as a thought, that the template drops from earlier answers. The
    # content then follows the text that both have in common.
    for first, second in writer.varied(messages, number).values():
        place = shared(first, second)
        if text.startswith(first[:place]) and content < place <= content + alike:
            return place
    return None


def _end_character(writer: ChatWriter, chat: Text, messages: Sequence[Message], number: int) -> int | None:
    """Character after an answer: after the text that follows its content both here and at the end of a chat."""
    text = chat.text
    if number + 1 == len(messages):
        return len(text)
    until = writer.tried(messages[: number + 1])
    if until is None:
        return None
    found = _texts_after(writer, (messages, text, False), (messages[: number + 1], until, False), number)
    if found is None:
        return None
    here, there = found
    alike, content = shared(here, there), len(text) - len(here)
    # Templates may end a chat differently from a message inside it. The text that both have in common ends the message.
    return content + alike if alike == len(there) else chat.complete(content, content + alike)


# A chat, its text, and whether the text ends with a generation prompt.
_Rendered = tuple[Sequence[Message], str, bool]


def _texts_after(writer: ChatWriter, one: _Rendered, other: _Rendered, number: int) -> tuple[str, str] | None:
    """Text after the content or call of message `number`, in both chats; None if it is not found."""
    texts = [
        {said: shared_end(*both) for said, both in writer.varied(m, number, a).items()} for m, _, a in (one, other)
    ]
    for said in texts[0]:
        ends = texts[0][said], texts[1].get(said)
        if ends[1] is not None and one[1].endswith(ends[0]) and other[1].endswith(ends[1]):
            return ends[0], ends[1]
    return None
