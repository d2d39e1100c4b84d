"""Where the answers of a chat stand in the text that its template writes, and in the tokens of that text.

A template appends where it writes the chat up to an answer, and up to what asks for it, as prefixes of the whole chat:
these texts then tell where an answer begins and ends. Other templates write parts of a chat in another way when it goes
on: Qwen 3's drops thoughts, Mistral's moves the system prompt. There, answers are found by what is written behind the
contents of messages; two renderings with other contents show where these are put.
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

# Characters of a template's text that an error shows.
_SHOWN = 30
LAST_ONLY = "task.train_on: last"


class Text:
    """A rendered text and its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.tokens = tokens_of(tokenizer, text)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Where each token begins and ends in the text, with the white space before it, which some tokenizers trim."""
        found = self.tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans, reached = [], 0
        for start, stop in found["offset_mapping"]:
            if start > reached:
                start = reached + len(self.text[reached:start].rstrip())
            reached = max(reached, stop)
            spans.append((start, stop))
        return spans

    def complete(self, begin: int, end: int) -> int:
        """Where the last whole end of a message lies between two places: an added token, or any token if there is none.

        White space behind it counts.
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
        """The first token of an answer, and the first one behind it.

        A token belongs to an answer if it reaches into it, though it begins with white space of what stands before.

        Args:
            begin, end: of the answer, in characters.
            where: names the message, for errors.

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
                    f"the tokenizer joins {self.text[start:stop]!r} in one token, of which only {inside!r} is of the "
                    f"answer",
                    "a template that ends prompts and answers with special tokens or white space",
                    where=where,
                )
            if (inside and not outside.strip()) or (start == stop and begin <= start < end):
                own.append(place)
        if not own:
            raise InputError("the tokenizer makes no token of it", "some text, to learn from", where=where)
        return own[0], own[-1] + 1


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's tokens, without those that a tokenizer adds to every text: templates write their own."""
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that are no pieces of texts: special tokens and those that were added to the vocabulary."""
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


@dataclass(frozen=True)
class Place:
    """An answer in a chat: its first token, the first one behind it, and where it begins in the text."""

    first: int
    stop: int
    begin: int


def answer_place(writer: ChatWriter, whole: Text, messages: Sequence[Message], number: int) -> Place:
    """Where the answer that message `number` is stands in the whole chat.

    Raises:
        InputError: the template refuses a part of the chat, writes the answer in another way when the chat goes on or
            when it is asked for, or one token joins the answer with other text; names the message.
    """
    try:
        return place_by_prefixes(writer, whole, messages, number)
    except InputError as error:
        place = place_by_contents(writer, whole, messages, number)
        if place is not None:
            return place
        if number + 1 == len(messages):
            raise
        expected = f"{error.expected}, or {LAST_ONLY}" if error.expected else LAST_ONLY
        raise InputError(error.found, expected, error.key, error.where) from error


def place_by_prefixes(writer: ChatWriter, whole: Text, messages: Sequence[Message], number: int) -> Place:
    """Where an answer stands, told from the chat up to it and up to what asks for it.

    Raises:
        InputError: these texts are no prefixes of the chat; or as `Text.places`.
    """
    where = f"{writer.where}: message {number}"
    until = whole.text if number + 1 == len(messages) else writer.write(messages[: number + 1])
    before = text_before(writer, messages[:number], until)
    tokens, first = whole.tokens, tokens_of(whole.tokenizer, before)
    last = tokens if until == whole.text else tokens_of(whole.tokenizer, until)
    if tokens[: len(last)] == last and last[: len(first)] == first and len(first) < len(last):
        return Place(len(first), len(last), len(before))
    if until == before:
        raise InputError("the chat template writes nothing for it", "some text, to learn from", where=where)
    if not until.startswith(before):
        place = shared(before, until)
        raise InputError(
            f"the chat template asks for an answer with {before[place:][:_SHOWN]!r}, where it writes "
            f"{until[place:][:_SHOWN]!r} when there is one",
            "a template whose answers follow its prompt",
            where=where,
        )
    if not whole.text.startswith(until):
        raise InputError(
            "the chat template renders it in another way when the chat goes on", "a template that appends", where=where
        )
    return Place(*whole.places(len(before), len(until), where), len(before))


def text_before(writer: ChatWriter, messages: Sequence[Message], text: str) -> str:
    """What a template writes before an answer to `messages`: what asks for it, or the beginning of `text`.

    Args:
        text: the chat with the answer.

    Raises:
        InputError: the template neither asks for answers nor writes the content of one.
    """
    # Templates refuse to ask for an answer to nothing, and some to a system prompt alone.
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
        # Where templates write more than the header before a content, such as an empty thought, that is learnt.
        header = asked[len(plain) :]
        place = before.rfind(header) if header.strip() else -1
        before = before[: place + len(header)] if place >= 0 else before
    return before


def around(writer: ChatWriter, messages: Sequence[Message]) -> tuple[str, str] | None:
    """What a template writes before and behind the content of an answer to `messages`; None where it is not found."""
    answered = [*messages, {"role": "assistant", "content": ""}]
    both = writer.varied(answered, len(messages)).get("content")
    return None if both is None else (both[0][: shared(*both)], shared_end(*both))


def place_by_contents(writer: ChatWriter, whole: Text, messages: Sequence[Message], number: int) -> Place | None:
    """Where an answer stands, told from what is written behind the contents of messages; None where that is not found.

    Raises:
        InputError: as `Text.places`.
    """
    begin, end = _begin(writer, whole, messages, number), _end(writer, whole, messages, number)
    if begin is None or end is None or begin >= end:
        return None
    return Place(*whole.places(begin, end, f"{writer.where}: message {number}"), begin)


def _begin(writer: ChatWriter, whole: Text, messages: Sequence[Message], number: int) -> int | None:
    """Where an answer begins, in characters: what follows the content before it, when it is asked for, ends there."""
    text = whole.text
    asked = writer.tried(messages[:number], asking=True) if number else None
    if asked is None:
        found = around(writer, messages[:number])
        # Nothing stands before the first answer that could be written in another way.
        if found is None or (number and not text.startswith(found[0])):
            return None
        return len(text_before(writer, messages[:number], text))
    found = _both_behind(writer, (messages, text, False), (messages[:number], asked, True), number - 1)
    if found is None:
        return None
    here, there = found
    alike, content = shared(here, there), len(text) - len(here)
    if alike == len(there):
        return content + alike
    if number + 1 == len(messages):
        return None
    # A template may ask for more than it writes for an answer that others follow, such as a thought: then its content
    # follows what both have in common.
    for first, second in writer.varied(messages, number).values():
        place = shared(first, second)
        if text.startswith(first[:place]) and content < place <= content + alike:
            return place
    return None


def _end(writer: ChatWriter, whole: Text, messages: Sequence[Message], number: int) -> int | None:
    """Where an answer ends, in characters: behind what follows its content both here and at the end of a chat."""
    text = whole.text
    if number + 1 == len(messages):
        return len(text)
    until = writer.tried(messages[: number + 1])
    if until is None:
        return None
    found = _both_behind(writer, (messages, text, False), (messages[: number + 1], until, False), number)
    if found is None:
        return None
    here, there = found
    alike, content = shared(here, there), len(text) - len(here)
    # Templates may end a chat in another way than a message of it: what both have in common ends the message.
    return content + alike if alike == len(there) else whole.complete(content, content + alike)


# A chat, the text of it, and whether it ends with what asks for an answer.
_Written = tuple[Sequence[Message], str, bool]


def _both_behind(writer: ChatWriter, one: _Written, other: _Written, number: int) -> tuple[str, str] | None:
    """What a template writes behind what message `number` says, in both chats; None where that is not found."""
    texts = [
        {said: shared_end(*both) for said, both in writer.varied(m, number, a).items()} for m, _, a in (one, other)
    ]
    for said in texts[0]:
        ends = texts[0][said], texts[1].get(said)
        if ends[1] is not None and one[1].endswith(ends[0]) and other[1].endswith(ends[1]):
            return ends[0], ends[1]
    return None
