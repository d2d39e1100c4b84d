"""Chat templates: the tokenizer's own or `task.chat_template`, rendered as text with the generated parts marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irdscale.errors import InputError
from irdscale.utils.hub import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
# Two contents that differ in every character. The text around a content is the same in both renderings.
CONTENTS = ("0", "1")
# The default date of Llama's templates. A fixed date gives a chat the same tokens on every day.
_DATE = "26 Jul 2024"
# The mark around generated text, in templates that have it.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_JINJA = re.compile(r"\{[{%]")


def with_chat_template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> PreTrainedTokenizerBase:
    """Give the tokenizer the template of `task.chat_template`, a file or its text, if set; returns the tokenizer.

    Raises:
        InputError: the file does not exist or is not text.
    """
    if given is not None:
        tokenizer.chat_template = given if _JINJA.search(given) else _read(given)
    return tokenizer


def _read(given: str) -> str:
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(
            f"{given!r} cannot be read: {reason}", "a Jinja template: a file, or its text", key="task.chat_template"
        ) from error


def check_syntax(tokenizer: PreTrainedTokenizerBase, given: str | None) -> None:
    """Check that a tokenizer's template is valid Jinja.

    Args:
        given: `task.chat_template`; None for the model's own template.

    Raises:
        InputError: it is not; names the file, if there is one, and the line.
    """
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": CONTENTS[0]}], tokenize=False)
    except TemplateSyntaxError as error:
        found = f"line {error.lineno} is no Jinja: {one_line(error)}"
        if given is None:
            found, key, where = f"the chat template of the tokenizer: {found}", "model.path", ""
        else:
            key, where = "task.chat_template", "" if _JINJA.search(given) else given
        raise InputError(found, "a Jinja template, as transformers reads it", key=key, where=where) from error
    except Exception:  # templates may refuse this chat, with any type of error
        return


class ChatWriter:
    """Renders chats by a tokenizer's template.

    Args:
        where: name of the row, for errors.
        tools: JSON schemas of the functions that the assistant may call.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, where: str, tools: Sequence[dict[str, Any]] | None = None
    ) -> None:
        self.tokenizer, self.where = tokenizer, where
        self._tools: Any = list(tools) if tools else None

    def write(self, messages: Sequence[Message], asking: bool = False) -> str:
        """The chat as text.

        Args:
            asking: end with the generation prompt.

        Raises:
            InputError: the template refuses the chat.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=self._tools, add_generation_prompt=asking, tokenize=False, date_string=_DATE
            )
            return str(text)
        except Exception as error:  # templates raise any type of error
            raise InputError(f"the chat template refuses it: {one_line(error)}", where=self.where) from error

    def tried(self, messages: Sequence[Message], asking: bool = False) -> str | None:
        """`write` for a chat that the user did not give; None if the template refuses it."""
        try:
            return self.write(messages, asking)
        except InputError:
            return None

    def varied(self, messages: Sequence[Message], number: int, asking: bool = False) -> dict[str, tuple[str, str]]:
        """Render the chat twice, with two values of one message's content, and of the function that it calls.

        Returns:
            `content` or `call` -> both texts, for each that changes the text.
        """
        found = {}
        for said, change in (("content", _with_content), ("call", _with_call)):
            both = [change(messages[number], value) for value in CONTENTS]
            texts = [
                None if each is None else self.tried([*messages[:number], each, *messages[number + 1 :]], asking)
                for each in both
            ]
            if texts[0] is not None and texts[1] is not None and texts[0] != texts[1]:
                found[said] = texts[0], texts[1]
        return found

    def marked(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]] | None:
        """Character ranges that the template marks as generated by the assistant.

        Args:
            text: the chat, from `write`.

        Returns:
            None if the template has no `{% generation %}`.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(tools=self._tools)
        if not _MARK.search(template):
            return None
        # The tokenizer's own mask of tokens extends to the end of the chat if an answer ends in white space that its
        # offsets leave out.
        settings: dict[str, Any] = {**self.tokenizer.special_tokens_map, "date_string": _DATE}
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            tools=self._tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **settings,
        )
        (written,), (spans,) = rendered
        return [(begin, end) for begin, end in spans if begin < end] if written == text else None


def _with_content(message: Message, value: str) -> Message:
    return {**message, "content": value}


def _with_call(message: Message, value: str) -> Message | None:
    """The message with another name for the last function that it calls; None if it calls none."""
    *calls, last = message.get("tool_calls") or [None]
    if not isinstance(last, dict):
        return None
    if isinstance(last.get("function"), dict):
        return {**message, "tool_calls": [*calls, {**last, "function": {**last["function"], "name": value}}]}
    return {**message, "tool_calls": [*calls, {**last, "name": value}]}


def shared(first: str, second: str) -> int:
    """Number of characters that two texts have in common at the beginning."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def shared_end(first: str, second: str) -> str:
    """The longest common ending of two texts."""
    return first[len(first) - shared(first[::-1], second[::-1]) :]
