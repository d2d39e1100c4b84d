"""Where a generated answer ends, and which answers agree."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as parts
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from irdscale.config.schema import RunConfig
from irdscale.errors import InputError
from irdscale.tasks import load_task
from irdscale.tasks.answers import AnswerEnds, same_answer
from irdscale.training.evaluate import evaluate_model

AGREE = [
    ("#### 3/4", "so it is 0.75"),
    ("3/4", "6/8"),
    ("1.75", "1 3/4"),
    ("1.5e3", "1,500.0"),
    ("2E-3", "0.002"),
    ("$18", "18.0"),
    ("18", "it costs $18."),
    ("18", "\\boxed{18}"),
    ("18", "**18**"),
    ("-5", "\N{MINUS SIGN}5"),
    ("-$5", "$-5"),
    ("12,345,678", "12345678"),
    ("50%", "50"),
    ("7", "x = 7"),
    ("7", "answer:7"),
    ("7", "7km"),
    ("24", "<<48/2=24>>24 clips"),
    ("7", "10-3=7"),
    ("0.1", "1/10"),
    ("#### Paris", "that is #### Paris\n\nQuestion: next"),
    ("#### Steps\n3 + 4\n#### 7", "#### Steps\n4 + 3\n#### 7\n#### 9"),
    ("4:30", "4:30"),
    ("3/0", "3/0"),
    ("", " \n"),
]
DIFFER = [
    ("#### 3/4", "#### 3/8"),
    ("3/4", "1/4"),
    ("8", "3/8"),
    ("3/4", "1 3/4"),
    ("4:30", "5:30"),
    ("30", "4:30"),
    ("1.5e3", "2.0e3"),
    ("H2O", "CO2"),
    ("2", "CO2"),
    ("Llama 3", "GPT 3"),
    ("#### Llama 3", "#### GPT 3"),
    ("3", "GPT-3"),
    ("x = 7 or x = 2", "x = 9 or x = 2"),
    ("7 kg", "9 kg"),
    ("> 5", "< 5"),
    ("2020-01-02", "2021-01-02"),
    ("3,14", "314"),
    ("50%", "$50"),
    ("5", "-5"),
    ("5", "5-7"),
    ("1", "1½"),
    ("12345678901234567890", "12345678901234567891"),
    ("#### Steps\n3 + 4\n#### 7", "#### Steps\n3 + 4\n#### 9"),
    ("#### Summary\nParis", "#### Summary\nRome"),
    ("#### Paris", "Paris #### Rome"),
    ("7", ""),
    ("7", "#### "),
    ("7", "7" * 9000),
    ("1", "1/0"),
    ("1e3", "1e99999999999"),
    ("Paris", ""),
]


@pytest.mark.parametrize(("expected", "found", "same"), [(*p, True) for p in AGREE] + [(*p, False) for p in DIFFER])
def test_which_answers_agree(expected: str, found: str, same: bool) -> None:
    assert same_answer(found, expected) is same
    assert same_answer(expected, expected)


def test_a_long_answer_is_compared_at_once() -> None:
    begun = time.perf_counter()
    for text in ("1,", "7.", "7a", "-", "7/", "#### "):
        same_answer(text * 20_000, "7")
    assert time.perf_counter() - begun < 2


SPECIAL = ["[PAD]", "[UNK]", "<eos>", "<end>", "<tool>", "<user>", "<bot>"]
WORDS = ["a", "b", "c", "d", "e", "plain", "\n", "7", "8"]
ID = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
TEMPLATE = "{% for m in messages %}<{{ 'user' if m.role == 'user' else 'bot' }}> {{ m.content }} END {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<bot> {% endif %}"


class Reciting(LlamaForCausalLM):
    """A model that goes on from the last token by a fixed rule, and where that is banned with `e`, or ends."""

    follows: dict[str, str]

    def forward(self, input_ids: Any = None, **more: Any) -> Any:  # type: ignore[override]
        output = super().forward(input_ids=input_ids, **more)
        rule = torch.zeros(len(ID), len(ID))
        for word, behind in self.follows.items():
            rule[ID[word], ID["e"]], rule[ID[word], ID[behind]] = 5, 9
        rule[:, ID["<eos>"]] += 1
        output.logits = rule[input_ids].to(output.logits.dtype)
        return output


def made(
    folder: Path, rows: list[dict[str, Any]], follows: dict[str, str], template: str | None = None, **settings: Any
) -> tuple[Any, Any]:
    """A model that recites `follows`, with these generation settings, and the task of these rows."""
    raw = Tokenizer(parts.WordLevel(ID, unk_token="[UNK]"))  # type: ignore[call-arg]
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<eos>",
        pad_token="[PAD]",
        unk_token="[UNK]",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(ID),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=64,
        eos_token_id=ID["<eos>"],
        pad_token_id=0,
    )
    model = Reciting(config)
    model.follows = follows
    model.save_pretrained(folder / "model")
    if settings:
        model.generation_config = GenerationConfig(**{"eos_token_id": ID["<eos>"], **settings})
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        with (folder / f"{split}.jsonl").open("w") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
    columns = {"messages": "m"} if template else {"prompt": "q", "completion": "a"}
    values = {
        "model": {"path": str(folder / "model")},
        "task": {
            "dataset": str(folder),
            "kind": "sft",
            "columns": columns,
            "metric": "exact_match",
            "max_length": 32,
            "max_new_tokens": 6,
        },
        "fisher": {"samples": 1},
        "search": {"min_samples": 1},
    }
    return model.eval(), load_task(RunConfig.model_validate(values))


def matched(model: Any, task: Any) -> float:
    return evaluate_model(model, task, task.test, 2)["exact_match"]


def chat(answer: str) -> list[dict[str, Any]]:
    return [{"m": [{"role": "user", "content": q}, {"role": "assistant", "content": answer}]} for q in ("a", "b b")]


def ending(end: str) -> str:
    return TEMPLATE.replace("END", end)


@pytest.mark.parametrize(
    ("follows", "template", "answer", "settings"),
    [
        # The template's end, which the model's own settings do not know; it goes on with another turn.
        ({"<bot>": "c", "c": "<end>", "<end>": "d", "d": "d"}, ending("<end>"), "c", {}),
        ({"<bot>": "c", "c": "<end>", "<end>": "d", "d": "d"}, ending("<end> \n"), "c", {}),
        ({"<bot>": "c", "c": "<end>", "<end>": "d", "d": "d"}, ending("<end> <eos>"), "c", {}),
        # The end of the sequence ends an answer too.
        ({"<bot>": "c", "c": "<eos>", "<eos>": "d", "d": "d"}, ending("<end>"), "c", {}),
        # Nothing else does: not a special token of another kind, nor a line break behind the end, nor a word that the
        # model's settings name.
        ({"<bot>": "c", "c": "<tool>", "<tool>": "d", "d": "<end>"}, ending("<end>"), "c <tool> d", {}),
        ({"<bot>": "c", "c": "\n", "\n": "d", "d": "<end>"}, ending("<end> \n"), "c \n d", {}),
        ({"<bot>": "c", "c": "d", "d": "<end>"}, ending("<end>"), "c d", {"eos_token_id": [ID["<eos>"], ID["c"]]}),
        # The model's own special ends do, but where answers hold them.
        ({"<bot>": "c", "c": "<tool>", "<tool>": "d"}, ending("<end>"), "c", {"eos_token_id": ID["<tool>"]}),
        (
            {"<bot>": "c", "c": "<tool>", "<tool>": "d", "d": "<end>"},
            ending("<end>"),
            "c <tool> d",
            {"eos_token_id": ID["<tool>"]},
        ),
        # An end that is an ordinary word, white space, or only the next turn's header.
        ({"<bot>": "c", "c": "plain", "plain": "d", "d": "d"}, ending("plain"), "c", {}),
        ({"<bot>": "c", "c": "\n", "\n": "d", "d": "d"}, ending("\n"), "c", {}),
        ({"<bot>": "c", "c": "<user>", "<user>": "d", "d": "d"}, ending(""), "c", {}),
        ({"<bot>": "c", "c": "\n", "\n": "d", "d": "<user>"}, ending("\n"), "c \n d", {}),
        # What the template writes before an answer, and a longer one of the model's own.
        (
            {"<bot>": "<tool>", "<tool>": "c", "c": "<end>"},
            ending("<end>").replace("'bot' }}> ", "'bot' }}> {{ '<tool> ' if m.role != 'user' }}"),
            "c",
            {},
        ),
        (
            {"<bot>": "d", "d": "<tool>", "<tool>": "c", "c": "<end>"},
            ending("<end>").replace("'bot' }}> ", "'bot' }}> {{ '<tool> ' if m.role != 'user' }}"),
            "c",
            {},
        ),
        # Greedily, whatever the model's settings say.
        ({"<bot>": "c", "c": "<end>"}, ending("<end>"), "c", {"min_new_tokens": 3}),
        ({"<bot>": "c", "c": "<end>"}, ending("<end>"), "c", {"min_length": 30}),
        ({"<bot>": "c", "c": "<end>"}, ending("<end>"), "c", {"suppress_tokens": [ID["c"]]}),
        ({"<bot>": "c", "c": "<end>"}, ending("<end>"), "c", {"begin_suppress_tokens": [ID["c"]]}),
        ({"<bot>": "c", "c": "<end>"}, ending("<end>"), "c", {"bad_words_ids": [[ID["c"]]]}),
        ({"<bot>": "c", "c": "<end>"}, ending("<end>"), "c", {"sequence_bias": [[[ID["d"]], 99.0]]}),
        ({"<bot>": "c", "c": "<end>"}, ending("<end>"), "c", {"do_sample": True, "temperature": 99.0, "num_beams": 3}),
        ({"<bot>": "c", "c": "<end>"}, ending("<end>"), "c", {"num_beams": 2, "num_return_sequences": 2}),
        ({"<bot>": "c", "c": "<end>"}, ending("<end>"), "c", {"return_dict_in_generate": True}),
        ({"<bot>": "c", "c": "d", "d": "<end>"}, ending("<end>"), "c d", {"stop_strings": ["c"]}),
    ],
)
def test_where_an_answer_ends(
    follows: dict[str, str], template: str, answer: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model, task = made(tmp_path, chat(answer), follows, template, **settings)
    own = model.generation_config
    assert matched(model, task) == 1
    assert model.generation_config is own
    model, task = made(tmp_path / "other", chat("e"), follows, template, **settings)
    assert matched(model, task) == 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"repetition_penalty": 50.0}, {"no_repeat_ngram_size": 1}, {"exponential_decay_length_penalty": (1, 99.0)}],
)
def test_repeated_words_are_not_banned(settings: dict[str, Any], tmp_path: Path) -> None:
    """Every word of the answer stands in the prompt already."""
    rows = [{"q": "a b c c ", "a": "a b a b a b"}, {"q": "b a c ", "a": "a b a b a b"}]
    model, task = made(tmp_path, rows, {"c": "a", "a": "b", "b": "a"}, **settings)
    assert matched(model, task) == 1


def test_a_completion_ends_with_the_sequence_of_the_tokenizer(tmp_path: Path) -> None:
    """The model's settings name another end, or none."""
    rows = [{"q": "c ", "a": "a b"}]
    for number, own in enumerate((ID["<end>"], None, [ID["a"]])):
        follows = {"c": "a", "a": "b", "b": "<eos>", "<eos>": "d"}
        folder = tmp_path / str(number)
        folder.mkdir()
        model, task = made(folder, rows, follows, eos_token_id=own)
        assert matched(model, task) == 1


def test_a_prompt_without_tokens_is_refused(tmp_path: Path) -> None:
    rows = [{"q": "c ", "a": "a"}, {"q": "", "a": "b"}, {"q": "  ", "a": "b"}]
    for broken, row in ((rows, 1), ([rows[0], rows[2]], 1)):
        message = rf"validation\.jsonl, row {row}: task\.columns\.prompt: found a prompt without tokens; expected some"
        with pytest.raises(InputError, match=message):
            made(tmp_path, broken, {"c": "a"})


def test_white_space_is_no_end_though_it_is_an_added_token(tmp_path: Path) -> None:
    """As the line breaks of Gemma's tokenizers are."""
    _, task = made(tmp_path, chat("c \n d"), {}, ending("\n"))
    task.tokenizer.add_tokens(["\n"])
    assert ID["\n"] in task.tokenizer.added_tokens_decoder
    ends = AnswerEnds(task.tokenizer, task.test, None)
    assert ends.tokens == [ID["<eos>"], ID["<user>"]]
    assert ends.answer(0, [ID[word] for word in ("c", "\n", "d", "<user>", "e")]).split() == ["c", "d"]
