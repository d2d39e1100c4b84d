"""Chats by templates as models ship them: what is learnt, what ends an answer, and why a chat is refused."""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as parts
from transformers import PreTrainedTokenizerFast

from irdscale.errors import InputError
from irdscale.models.chunked_losses import IGNORED
from irdscale.tasks.chats import Chat, chat_sample
from irdscale.tasks.messages import chat_messages

SPECIAL = ["<|endoftext|>", "<pad>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|eom|>", "<think>", "</think>"]
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Strips contents, writes another end behind calls of tools, and knows no system prompt.
STRIPPING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n\n{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}<|eom|>"
    "{% else %}{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
SPACED = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ ' ' if m.role == 'user' else eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Wants a message of the user before it asks for an answer.
ASKING = "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}" + CHATML
# Asks for a thought, and then writes none.
FORGETTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TEXTUAL = (
    "{% for m in messages %}{{ 'User: ' if m.role == 'user' else 'Bot: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Bot: {% endif %}"
)


def tokenizer(template: str, trimmed: bool = True, special: list[str] = SPECIAL) -> Any:
    """A byte-level BPE tokenizer whose tokens take the space before words; `trimmed`: offsets leave that space out."""
    raw = Tokenizer(parts.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    raw.post_processor = processors.ByteLevel(trim_offsets=trimmed)  # type: ignore[assignment]
    texts = ["USER: Where? ASSISTANT: Paris User: hello\nBot: hello\n\n\n fine"] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")
    made.chat_template = template
    return made


def said(*contents: str, first: str = "user") -> list[dict[str, Any]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def learnt(made: Any, chat: Chat) -> list[str]:
    """The texts of each run of labels."""
    texts: list[list[int]] = [[]]
    for token, label in zip(chat.input_ids, chat.labels, strict=True):
        if label == IGNORED:
            texts.append([])
        else:
            assert label == token
            texts[-1].append(label)
    return [made.decode(ids) for ids in texts if ids]


@pytest.mark.parametrize("trimmed", [True, False])
@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, said("Where?", "Paris"), ["Paris<|im_end|>\n"]),
        (CHATML, said("hello", "Where?", "Paris", first="assistant"), ["hello<|im_end|>\n", "Paris<|im_end|>\n"]),
        (CHATML, said("hello", first="assistant"), ["hello<|im_end|>\n"]),
        (CHATML, said(" hello", "Where?", " Paris", first="assistant"), [" hello<|im_end|>\n", " Paris<|im_end|>\n"]),
        # A token of several line breaks joins the prompt with the answer.
        (CHATML, said("Where?", "\n\n\nParis"), ["\n\n\n\nParis<|im_end|>\n"]),
        (STRIPPING, said(" hello ", " Where?", "\nParis\n", first="assistant"), ["hello<|eot|>", "Paris<|eot|>"]),
        (SPACED, said("Where?", "Paris"), [" Paris</s>"]),
        (SPACED, said("Where?", "Paris", "fine", "hello"), [" Paris</s>", " hello</s>"]),
        (SPACED, said("hello", "Where?", "Paris", first="assistant"), [" hello</s>", " Paris</s>"]),
        (SPACED, said("Where?", " Paris"), [" Paris</s>"]),
        # An empty thought is learnt with every answer, the first one too.
        (THINKING, said("hello", first="assistant"), ["<think>\n\n</think>\n\nhello<|im_end|>\n"]),
        (TEXTUAL, said("Where?", "Paris", "hello", "fine"), [" Paris\n", " fine\n"]),
        (ASKING, said("Where?", "Paris", "hello", "fine"), ["Paris<|im_end|>\n", "fine<|im_end|>\n"]),
        (ASKING, [{"role": "system", "content": "x"}, *said("hello", first="assistant")], ["hello<|im_end|>\n"]),
    ],
)
def test_answers_alone_are_learnt(template: str, messages: Any, expected: list[str], trimmed: bool) -> None:
    made = tokenizer(template, trimmed)
    chat = chat_sample(made, messages, "here")
    assert learnt(made, chat) == expected
    rendered = made.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert chat.input_ids == rendered
    assert made.decode(chat.input_ids[chat.prompt_length :]) == expected[-1]
    assert chat.answer == messages[-1]["content"]


CALL = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]


@pytest.mark.parametrize(
    ("template", "messages", "opening", "ends", "answer"),
    [
        (CHATML, said("Where?", "Paris\n"), "", ["<|im_end|>\n"], "Paris\n"),
        (STRIPPING, said("Where?", "Paris"), "", ["<|eot|>"], "Paris"),
        (
            STRIPPING,
            [*CALL[:1], {**CALL[1], "tool_calls": [{"function": {"arguments": {"city": "Paris"}}}]}],
            "",
            ["<|eom|>"],
            '{"city": "Paris"}',
        ),
        (SPACED, said("Where?", "Paris"), "", ["</s>"], "Paris"),
        (THINKING, said("Where?", "Paris"), "<think>\n\n</think>\n\n", ["<|im_end|>\n"], "Paris"),
        # White space ends an answer only where no answer holds it; the next turn's header does anyway.
        (TEXTUAL, said("Where?", "Paris"), "", ["\n", "\nUser: "], "Paris"),
        (
            CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", ""),
            said("Where?", "Paris"),
            "<|im_start|>assistant\n",
            ["<|im_end|>\n"],
            "Paris",
        ),
    ],
)
def test_what_stands_around_the_last_answer(
    template: str, messages: Any, opening: str, ends: list[str], answer: str
) -> None:
    chat = chat_sample(tokenizer(template), messages, "here")
    assert (chat.opening, chat.ends, chat.answer) == (opening, ends, answer)


@pytest.mark.parametrize(
    ("template", "messages", "match"),
    [
        (STRIPPING, [{"role": "system", "content": "x"}, *said("a", "b")], "the chat template refuses it: no system"),
        (
            FORGETTING,
            said("Where?", "Paris"),
            r"message 1: the chat template asks for an answer with '<think>\\n', wher",
        ),
        (
            TEXTUAL.replace("Bot: ", "").replace("\n", ""),
            said("hello", ""),
            "message 1: the chat template writes no text for this answer",
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", said("US", "ER"), "joins 'USER' in one token, of whi"),
    ],
)
def test_the_true_reason_of_a_refusal(template: str, messages: Any, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        chat_sample(tokenizer(template), messages, "here")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("here: ")


def test_a_chat_that_begins_with_a_call_of_a_tool() -> None:
    """Its header is not that of an answer in text."""
    made = tokenizer(STRIPPING.replace("\n\n{% if m", "{{ ' calls ' if m.tool_calls else '\n\n' }}{% if m"))
    messages = [{**CALL[1], "tool_calls": [{"function": {"arguments": {"city": "Paris"}}}]}]
    chat = chat_sample(made, messages, "here")
    assert learnt(made, chat) == [' calls {"city": "Paris"}<|eom|>']


def column(chats: list[Any], features: Any = None) -> Any:
    table = datasets.Dataset.from_dict({"m": chats}, features=features).with_format("arrow")[:]
    return table.column("m")


def test_nested_fields_that_hold_nothing_are_left_out() -> None:
    def call(**arguments: Any) -> list[dict[str, Any]]:
        function = {"name": "f", "arguments": {"given": arguments, "list": [{"x": 1}, {"y": arguments}]}}
        return [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        ]

    chats = [call(city="Paris"), call(zip=[7, None], deep={"a": {"b": 0}}), call(deep={"a": {"c": False, "d": ""}})]
    found = column(chats)
    padded = found.to_pylist()[0][1]["tool_calls"][0]["function"]["arguments"]["given"]
    assert padded == {"city": "Paris", "zip": None, "deep": None}
    assert [chat_messages(found, row, "here") for row in range(3)] == chats
    # As they lie in a table of several pieces, too.
    pieces = pa.chunked_array([found.combine_chunks().slice(0, 2), found.combine_chunks().slice(2)])
    assert chat_messages(pieces, 2, "here") == chats[2]


def test_columns_of_json_and_maps() -> None:
    messages = said("Where?", "Paris")
    if hasattr(datasets, "Json"):
        calling = [messages[0], {**messages[1], "tool_calls": [{"function": {"arguments": {"city": "Paris"}}}]}]
        for kind in (datasets.List(datasets.Json()), datasets.Json()):
            found = column([calling, messages], datasets.Features({"m": kind}))
            assert chat_messages(found, 0, "here") == calling
            assert chat_messages(found, 1, "here") == messages
    mapped = pa.list_(
        pa.struct({"role": pa.string(), "content": pa.string(), "more": pa.map_(pa.string(), pa.int64())})
    )
    array = pa.chunked_array([pa.array([[{**messages[1], "more": [("a", 1), ("b", None)]}]], mapped)])
    assert chat_messages(array, 0, "here") == [{**messages[1], "more": {"a": 1}}]


def test_a_message_that_calls_tools_may_say_nothing() -> None:
    calls = [{"function": {"name": "f"}}]
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    assert chat_messages(column([chat]), 0, "here")[1] == {"role": "assistant", "tool_calls": calls}
    with pytest.raises(InputError, match=r"here: message 1: found .*; expected a role and a content, as text"):
        chat_messages(column([[chat[0], {"role": "assistant", "content": None}]]), 0, "here")


def test_a_chat_has_the_same_tokens_on_every_day() -> None:
    """By the template of Llama 3, which writes the day where nobody tells it the date."""
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    made = tokenizer(dated + "Today Date: {{ date_string }}\n" + CHATML)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]
    assert made.decode(chat_sample(made, messages, "row").input_ids).startswith("Today Date: 26 Jul 2024\n")
