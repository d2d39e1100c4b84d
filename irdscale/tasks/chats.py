"""Chats as a tokenizer's template writes them: the tokens of the answers, and what stands around the last one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from irdscale.errors import InputError, kind_of
from irdscale.models.chunked_losses import IGNORED
from irdscale.utils.hub import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Two contents that differ in every character: what a template writes around a content is what both renderings share.
_CONTENTS = ("0", "1")
# What Llama's templates write where nothing tells the date: the same chat has the same tokens on every day of a run.
_DATE = "26 Jul 2024"
# Characters of a template's text that an error shows.
_SHOWN = 30

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A chat's tokens, and those of the assistant's messages as labels.

    `prompt_length` counts the tokens before the last answer. `opening` is what the template writes between that prompt
    and the answer's content; `ends` are the texts by which it ends the answer.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    answer: str
    opening: str
    ends: list[str]


def chat_messages(column: pa.ChunkedArray, row: int, where: str) -> list[Message]:
    """A row's chat, up to its last message of the assistant, without the fields that hold nothing.

    Tables give every struct the fields of all of them, and null where a row has no such field.

    Raises:
        InputError: it is no list of messages, or none of them is the assistant's.
    """
    value = _without_nulls(column[row].as_py(), column.type)
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: found {kind_of(value)}; expected a list of {{role, content}}")
    for number, message in enumerate(value):
        if not _is_message(message):
            raise InputError(f"{where}: message {number}: found {message!r}; expected a role and a content, as text")
    messages: list[Message] = value
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise InputError(f"{where}: found no message of the role assistant; expected one, to learn from")
    return messages


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    # A message that calls tools may say nothing.
    return isinstance(value.get("content"), str) or ("content" not in value and bool(value.get("tool_calls")))


def _without_nulls(value: Any, kind: pa.DataType | None = None) -> Any:
    """The value without the fields that are null, at every depth; elements of lists stay. Reads JSON and map types."""
    inner = getattr(kind, "value_type", None)
    if isinstance(value, str) and isinstance(kind, getattr(pa, "JsonType", ())):
        return _without_nulls(json.loads(value))
    if kind is not None and pa.types.is_map(kind):
        return {key: _without_nulls(each, kind.item_type) for key, each in value or () if each is not None}
    if isinstance(value, dict):
        kinds = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if kind is not None else {}
        return {key: _without_nulls(each, kinds.get(key)) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each, inner) for each in value]
    return value


def chat_sample(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> Chat:
    """The tokens of a chat that ends with a message of the assistant.

    A token that reaches into an answer is learnt with it, though it begins with white space of what stands before.

    Args:
        where: names the row, for messages.

    Raises:
        InputError: the template refuses the chat, renders an answer in another way when the chat goes on or when it is
            asked for, or one token joins an answer with other text; names the message.
    """
    messages = list(messages)
    whole = _Text(tokenizer, _rendered(tokenizer, messages, False, where))
    labels, prompt, before = [IGNORED] * len(whole.tokens), 0, ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        ended = number + 1 == len(messages)
        until = whole.text if ended else _rendered(tokenizer, messages[: number + 1], False, where)
        # Templates refuse to ask for an answer to nothing, and some to a system prompt alone.
        asked = _probed(tokenizer, messages[:number], True) if number else None
        before = _before_content(tokenizer, messages[:number], until, where) if asked is None else asked
        prompt, stop = _answer_tokens(whole, before, until, f"{where}: message {number}")
        labels[prompt:stop] = whole.tokens[prompt:stop]
    return Chat(whole.tokens, labels, prompt, *_last_answer(whole, messages, before))


class _Text:
    """A rendered text and its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.tokens = _tokens(tokenizer, text)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Where each token begins and ends in the text, with the white space before it, which some tokenizers trim."""
        found = self.tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        reached = 0
        for start, stop in found["offset_mapping"]:
            if start > reached:
                start = reached + len(self.text[reached:start].rstrip())
            reached = max(reached, stop)
            yield start, stop


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _answer_tokens(whole: _Text, before: str, until: str, where: str) -> tuple[int, int]:
    """The first token of an answer, and the first one behind it.

    Args:
        before: what the template writes before the answer.
        until: what it writes when the chat ends with the answer.
    """
    tokens, first = whole.tokens, _tokens(whole.tokenizer, before)
    last = tokens if until == whole.text else _tokens(whole.tokenizer, until)
    if tokens[: len(last)] == last and last[: len(first)] == first and len(first) < len(last):
        return len(first), len(last)
    if until == before:
        raise InputError(f"{where}: the chat template writes nothing for it; expected some text, to learn from")
    if not until.startswith(before):
        place = _shared(before, until)
        raise InputError(
            f"{where}: the chat template asks for an answer with {before[place:][:_SHOWN]!r}, where it writes "
            f"{until[place:][:_SHOWN]!r} when there is one; expected a template whose answers follow its prompt"
        )
    if not whole.text.startswith(until):
        raise InputError(
            f"{where}: the chat template renders it in another way when the chat goes on; "
            f"expected a template that appends (or chats with one message of the assistant)"
        )
    begin, end = len(before), len(until)
    own = []
    for place, (start, stop) in enumerate(whole.spans()):
        inside = whole.text[max(start, begin) : min(stop, end)]
        outside = whole.text[start : min(stop, begin)] + whole.text[max(start, end) : stop]
        if inside.strip() and outside.strip():
            raise InputError(
                f"{where}: the tokenizer joins {whole.text[start:stop]!r} in one token, of which only {inside!r} is of "
                f"the answer; expected a template that ends prompts and answers with special tokens or white space"
            )
        if (inside and not outside.strip()) or (start == stop and begin <= start < end):
            own.append(place)
    if not own:
        raise InputError(f"{where}: the tokenizer makes no token of it; expected some text, to learn from")
    return own[0], own[-1] + 1


def _before_content(tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str, where: str) -> str:
    """What the template writes before an answer, told from `text`, where it ends: default system prompt and header.

    Raises:
        InputError: the template does not write the content of an answer.
    """
    around = _around(tokenizer, messages)
    if around is None:
        raise InputError(
            f"{where}: the chat template does not show where an answer to {len(messages)} messages begins; "
            f"expected a chat that begins with a message of the user"
        )
    before = text[: _shared(text, around[0])]
    asked, plain = (_probed(tokenizer, [{"role": "user", "content": _CONTENTS[0]}], asking) for asking in (True, False))
    if asked is not None and plain is not None and asked.startswith(plain):
        # Where templates write more than the header before a content, such as an empty thought, that is learnt.
        header = asked[len(plain) :]
        place = before.rfind(header) if header.strip() else -1
        before = before[: place + len(header)] if place >= 0 else before
    return before


def _around(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, str] | None:
    """What the template writes before and behind the content of an answer to `messages`; None where it is not found."""
    first, second = (_probed(tokenizer, [*messages, {"role": "assistant", "content": each}]) for each in _CONTENTS)
    if first is None or second is None or first == second:
        return None
    behind = _shared(first[::-1], second[::-1])
    return first[: _shared(first, second)], first[len(first) - behind :]


def _shared(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def _last_answer(whole: _Text, messages: list[Message], before: str) -> tuple[str, str, list[str]]:
    """The last answer as text, what the template writes before its content, and the texts by which it ends."""
    tokenizer, text, message = whole.tokenizer, whole.text, messages[-1]
    content = message.get("content", "")
    head, tail = _around(tokenizer, messages[:-1]) or (before, "")
    if not text.startswith(head):
        head = before
    if not text.endswith(tail):
        # Calls of tools end in another way than texts: by the last special token.
        written = text.rstrip()
        special = (str(tokenizer.convert_ids_to_tokens(token)) for token in added_tokens(tokenizer))
        tail = max((t for t in special if written.endswith(t)), key=len, default="") + text[len(written) :]
    ends = [tail] if tail else []
    if not tail.strip():
        # The next turn begins behind the answer, where nothing else does.
        first, second = (_probed(tokenizer, [*messages, {"role": "user", "content": each}]) or "" for each in _CONTENTS)
        header = first[len(text) : _shared(first, second)]
        if first.startswith(text) and header.strip():
            ends.append(tail + header)
    opening = head[len(before) :] if head.startswith(before) else ""
    if not content.strip() or message.get("tool_calls"):
        written = text[len(head) : len(text) - len(tail)]
        content = str(tokenizer.decode(_tokens(tokenizer, written))).strip()
    return content, opening, ends


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that are no pieces of texts: special tokens and those that were added to the vocabulary."""
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


def _probed(tokenizer: PreTrainedTokenizerBase, messages: list[Message], asking: bool = False) -> str | None:
    """A chat that is not the user's as the template writes it; None where it refuses."""
    try:
        return _rendered(tokenizer, messages, asking, "")
    except InputError:
        return None


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], asking: bool, where: str) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=asking, tokenize=False, date_string=_DATE)
        return str(text)
    except Exception as error:  # templates raise what they like, by jinja2's classes
        raise InputError(f"{where}: the chat template refuses it: {one_line(error)}") from error
