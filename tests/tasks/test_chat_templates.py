"""Chats of several turns by the templates of models: exactly the assistant's tokens are learnt.

The files in `chat_templates` are written anew; each says whose template it stands for, where that was read, and its
licence. They write what these templates write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from irdscale.errors import InputError
from irdscale.models.chunked_losses import IGNORED
from irdscale.tasks.answer_places import Text, place_by_contents, place_by_prefixes
from irdscale.tasks.chat_templates import ChatWriter, check_syntax, with_chat_template
from irdscale.tasks.chats import Chat, chat_sample
from tests.tasks import test_chats as plain

FOLDER = Path(__file__).resolve().parent / "chat_templates"
STORIES = Path(__file__).resolve().parents[2] / "configs" / "models" / "stories260K"
TEMPLATES = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.jinja"))}
# What these models' tokenizers have as tokens of their own.
SPECIAL = {
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"],
    "phi4": ["<|im_start|>", "<|im_sep|>", "<|im_end|>"],
    "phi4_mini": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "qwen25": ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"],
    "qwen3": ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"],
    "smollm2": ["<|im_start|>", "<|im_end|>"],
}
# What ends an answer, and what ends the last one.
ENDS = {
    "gemma3": "<end_of_turn>\n",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "phi4": "<|im_end|>",
    "phi4_mini": "<|end|>",
    "qwen25": "<|im_end|>\n",
    "qwen3": "<|im_end|>\n",
    "smollm2": "<|im_end|>\n",
}
LAST = {"phi4_mini": "<|end|></s>"}
EMPTY = "<think>\n\n</think>\n\n"
TURNS = plain.said("Where is it?", "It is in Paris.", "Is it old?", "Yes: 7 years,\n\nor 8.", "Thanks", "Fine")
SYSTEM = {"role": "system", "content": "Be brief."}


def tokenizer(name: str, kind: str = "bytes") -> Any:
    """A small tokenizer with a model's special tokens: of bytes (offsets trimmed or not), or of pieces of words."""
    if kind == "pieces":
        made = AutoTokenizer.from_pretrained(STORIES)
        made.add_special_tokens({"additional_special_tokens": SPECIAL[name]})
    else:
        made = plain.tokenizer(
            "", trimmed=kind == "trimmed", special=["<|endoftext|>", "<pad>", "</s>", *SPECIAL[name]]
        )
    made.chat_template = TEMPLATES[name]
    return made


def learnt(made: Any, chat: Chat, kind: str = "bytes") -> list[str]:
    return shown(plain.learnt(made, chat), kind)


def shown(texts: list[str], kind: str) -> list[str]:
    """Texts as they are compared: decoded pieces have more spaces, at the beginning and beside special tokens."""
    return [text.replace(" ", "") for text in texts] if kind == "pieces" else texts


KINDS = ["bytes", "trimmed", "pieces"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_three_turns_give_exactly_the_tokens_of_the_assistant(name: str, system: bool, kind: str) -> None:
    made = tokenizer(name, kind)
    messages = [*([SYSTEM] if system else []), *TURNS]
    chat = chat_sample(made, messages, "here")
    answers = [message["content"] for message in TURNS if message["role"] == "assistant"]
    space = " " if name == "mistral" else ""
    expected = [f"{space}{answer}{ENDS[name]}" for answer in answers]
    expected[-1] = f"{space}{EMPTY if name == 'qwen3' else ''}{answers[-1]}{LAST.get(name, ENDS[name])}"
    expected = shown(expected, kind)
    assert learnt(made, chat, kind) == expected
    assert chat.input_ids == made.apply_chat_template(messages, return_dict=False, date_string="26 Jul 2024")
    assert shown([made.decode(chat.input_ids[chat.prompt_length :])], kind) == expected[-1:]
    assert (chat.answer, chat.as_asked) == ("Fine", not (name == "mistral" and system))
    last = chat_sample(made, messages, "here", last_only=True)
    assert learnt(made, last, kind) == expected[-1:]
    assert (last.input_ids, last.prompt_length, last.ends) == (chat.input_ids, chat.prompt_length, chat.ends)


def thinking(*thoughts: str, field: bool) -> list[dict[str, Any]]:
    """Turns with thoughts: in a field of their own, or within the content."""
    messages = []
    for number, thought in enumerate(thoughts):
        content = f"Answer {number}"
        said = {"content": content, "reasoning_content": thought}
        answer = said if field else {"content": f"<think>\n{thought}\n</think>\n\n{content}"}
        messages += [{"role": "user", "content": f"Question {number}"}, {"role": "assistant", **answer}]
    return messages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", [False, True])
def test_thoughts_of_earlier_turns_are_dropped_and_not_learnt(field: bool, kind: str) -> None:
    made = tokenizer("qwen3", kind)
    chat = chat_sample(made, thinking("first", "second", "third", field=field), "here")
    written = ["Answer 0<|im_end|>\n", "Answer 1<|im_end|>\n", "<think>\nthird\n</think>\n\nAnswer 2<|im_end|>\n"]
    assert learnt(made, chat, kind) == shown(written, kind)
    text = made.decode(chat.input_ids)
    assert "first" not in text
    assert "second" not in text
    assert "third" in text
    # What a model thinks before an answer is not compared with what it answers.
    assert (chat.answer, chat.opening, chat.ends) == ("Answer 2", EMPTY, ["<|im_end|>\n"])


def test_a_template_that_asks_for_thoughts_that_it_drops() -> None:
    """As those of Qwen 3's thinking models do."""
    made = tokenizer("qwen3")
    header = "{{- '<|im_start|>assistant\\n' }}\n    {{- '<think>"
    assert header in made.chat_template
    made.chat_template = made.chat_template.replace(header, header.replace("assistant\\n", "assistant\\n<think>\\n"))
    chat = chat_sample(made, thinking("first", "second", field=False), "here")
    assert learnt(made, chat) == ["Answer 0<|im_end|>\n", "second\n</think>\n\nAnswer 1<|im_end|>\n"]
    assert (chat.answer, chat.opening) == ("Answer 1", "\n</think>\n\n")


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CALLING = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "no", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "No rain."},
    {"role": "user", "content": "Good."},
    {"role": "assistant", "content": "Yes."},
]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
CALLS = {
    "llama3": '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]</s>',
    "qwen25": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n',
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n',
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", sorted(CALLS))
def test_calls_of_tools_are_learnt_and_the_template_gets_the_tools(
    name: str, tools: list[dict[str, Any]] | None, kind: str
) -> None:
    made = tokenizer(name, kind)
    chat = chat_sample(made, CALLING, "here", tools)
    space = " " if name == "mistral" else ""
    texts = [f"{space}No rain.{ENDS[name]}", f"{space}{EMPTY if name == 'qwen3' else ''}Yes.{ENDS[name]}"]
    assert learnt(made, chat, kind) == shown([CALLS[name], *texts], kind)
    assert ('"properties"' in made.decode(chat.input_ids)) is (tools is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_contents_tell_what_prefixes_tell(name: str, kind: str) -> None:
    """Wherever the chat up to an answer is a prefix of the whole chat, both ways find the same tokens."""
    made, told = tokenizer(name, kind), 0
    for messages in (TURNS, [SYSTEM, *TURNS], thinking("a", "b", field=False), CALLING):
        writer = ChatWriter(made, "here")
        try:
            whole = Text(made, writer.write(messages))
        except InputError:
            continue
        for number in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
            try:
                place = place_by_prefixes(writer, whole, messages, number)
            except InputError:
                continue
            # Phi-4 does not write what tools say, where the answer to that begins.
            if name == "phi4" and messages[number - 1]["role"] == "tool":
                continue
            assert place_by_contents(writer, whole, messages, number) == place
            told += 1
    assert told >= 3


MARKED = plain.CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
)
# Marks the header too, and what is generated in tags of another kind.
HEADED = MARKED.replace(
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}",
    "{% if m.role == 'assistant' %}{%- generation -%}<|im_start|>assistant\n",
).replace("{% else %}", "{% else %}<|im_start|>{{ m.role }}\n")


@pytest.mark.parametrize("trimmed", [True, False])
def test_what_a_template_marks_is_learnt(trimmed: bool) -> None:
    made = plain.tokenizer(MARKED, trimmed)
    chat = chat_sample(made, TURNS, "here")
    expected = [f"{message['content']}<|im_end|>\n" for message in TURNS[1::2]]
    assert plain.learnt(made, chat) == expected
    assert made.decode(chat.input_ids[chat.prompt_length :]) == expected[-1]
    assert plain.learnt(made, chat_sample(made, TURNS, "here", last_only=True)) == expected[-1:]
    if not trimmed:
        found = made.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
        assert [int(label != IGNORED) for label in chat.labels] == found["assistant_masks"]
        assert chat.input_ids == found["input_ids"]
    # A prompt asks for the answer, though its end is marked.
    made.chat_template = HEADED
    headed = chat_sample(made, TURNS, "here")
    assert plain.learnt(made, headed) == [f"<|im_start|>assistant\n{text}" for text in expected]
    assert (headed.input_ids, headed.prompt_length) == (chat.input_ids, chat.prompt_length)
    assert (headed.answer, headed.opening, headed.ends) == ("Fine", "", ["<|im_end|>\n"])
    # Marks decide, also where an answer is found in no other way.
    made.chat_template = MARKED.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    assert plain.learnt(made, chat_sample(made, TURNS, "here")) == expected
    assert not chat_sample(made, TURNS, "here").as_asked


def test_a_template_that_marks_nothing_of_a_chat() -> None:
    made = plain.tokenizer(MARKED.replace("m.role == 'assistant'", "m.role == 'bot'"))
    with pytest.raises(
        InputError, match=r"^here: the chat template marks nothing of it as generated; expected \{% gen"
    ):
        chat_sample(made, TURNS, "here")


def test_where_characters_tell_nothing_the_last_answer_can_be_learnt() -> None:
    template = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    made = plain.tokenizer(template)
    with pytest.raises(InputError) as caught:
        chat_sample(made, TURNS, "here")
    assert str(caught.value) == (
        "here: message 1: the chat template renders it in another way when the chat goes on; "
        "expected a template that appends, or task.train_on: last"
    )
    assert plain.learnt(made, chat_sample(made, TURNS, "here", last_only=True)) == ["Fine<|im_end|>\n"]


def test_an_answer_that_the_template_does_not_show() -> None:
    """A template that refuses the chat up to the answer."""
    made = plain.tokenizer("{% if messages | length < 3 %}{{ raise_exception('too short') }}{% endif %}" + plain.CHATML)
    with pytest.raises(
        InputError, match=r"^here: the chat template refuses it: too short; expected task\.train_on: la"
    ):
        chat_sample(made, TURNS[:4], "here")
    chat = chat_sample(made, TURNS[:4], "here", last_only=True)
    assert plain.learnt(made, chat) == [f"{TURNS[3]['content']}<|im_end|>\n"]


def test_a_template_that_is_given(tmp_path: Path) -> None:
    made = plain.tokenizer(plain.CHATML)
    assert with_chat_template(made, None).chat_template == plain.CHATML
    assert with_chat_template(made, plain.SPACED).chat_template == plain.SPACED
    file = tmp_path / "chat.jinja"
    file.write_text(plain.TEXTUAL)
    assert with_chat_template(made, str(file)).chat_template == plain.TEXTUAL
    with pytest.raises(
        InputError, match=r"^task\.chat_template: '.*missing' cannot be read: No such file or directory"
    ):
        with_chat_template(made, str(tmp_path / "missing"))
    file.write_bytes(b"\xff\xfe{{")
    with pytest.raises(InputError, match="not a text file; expected a Jinja template: a file, or its text"):
        with_chat_template(made, str(file))


def test_a_template_with_an_error_of_syntax(tmp_path: Path) -> None:
    broken = "{% for m in messages %}\n{{ m.content }\n{% endfor %}"
    made = plain.tokenizer(broken)
    for given, begins in ((broken, r"^task\.chat_template: line 2"), (None, r"^model\.path: the chat .*: line 2")):
        with pytest.raises(
            InputError, match=rf"{begins} is no Jinja: unexpected '}}'; expected a Jinja template"
        ) as found:
            check_syntax(made, given)
        assert "\n" not in str(found.value)
    file = tmp_path / "chat.jinja"
    with pytest.raises(InputError, match=rf"^{file}: task\.chat_template: line 2 is no Jinja"):
        check_syntax(made, str(file))
    # What a template refuses is told with the row.
    check_syntax(plain.tokenizer("{{ raise_exception('no') }}"), None)
    check_syntax(plain.tokenizer(MARKED), None)
